"""Small values for the algorithms' tests: packed micro-batches, groups, signals."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from rlhf.algorithms.base import TensorBatch
from rlhf.types import Denominators, Example, FinishReason, Prompt, Reward, Rollout, ScoredGroup, Signal, Signals

COLUMNS = ("old_log_probs", "ref_log_probs", "advantages", "returns", "values")


def tensor_batch(
    loss_mask: Sequence[bool],
    lengths: Sequence[int],
    *,
    denominators: Denominators | None = None,
    coefficients: Mapping[str, float] | None = None,
    **columns: torch.Tensor,
) -> TensorBatch:
    """A micro-batch that is the whole step, unless other denominators are given. Without log-probs of the sampler, it
    agrees with the old policy."""
    if "old_log_probs" in columns:
        columns = {"sampler_log_probs": columns["old_log_probs"].detach()} | columns
    masks = np.split(np.array(loss_mask, dtype=bool), np.cumsum(lengths)[:-1])
    return TensorBatch(
        lengths=torch.tensor(lengths),
        loss_mask=torch.tensor(loss_mask, dtype=torch.bool),
        example_index=torch.arange(len(lengths)),
        targets=torch.zeros(len(lengths)),
        margins=torch.zeros(len(lengths)),
        denominators=denominators
        or Denominators(
            tokens=float(sum(loss_mask)), sequences=float(sum(m.any() for m in masks)), examples=float(len(lengths))
        ),
        coefficients=coefficients or {"kl": 0.0, "penalty": 0.0},
        signals={Signal(name): column for name, column in columns.items()},
    )


def prompt(num_tokens: int = 3, name: str = "p") -> Prompt:
    return Prompt(id=name, token_ids=np.arange(100, 100 + num_tokens), text="?")


def rollout(
    token_ids: Sequence[int],
    *,
    name: str = "a",
    finish_reason: FinishReason = FinishReason.STOP,
    log_probs: Sequence[float] | None = None,
    loss_mask: Sequence[bool] | None = None,
) -> Rollout:
    return Rollout(
        id=name,
        prompt_id="p",
        token_ids=np.array(token_ids, dtype=np.int64),
        log_probs=np.array([-1.0] * len(token_ids) if log_probs is None else log_probs, dtype=np.float32),
        finish_reason=finish_reason,
        weight_version=7,
        loss_mask=None if loss_mask is None else np.array(loss_mask, dtype=bool),
    )


def group(
    rollouts: Sequence[Rollout],
    rewards: Sequence[float],
    *,
    margins: Sequence[float] = (),
    labels: Sequence[bool] = (),
    name: str = "p",
) -> ScoredGroup:
    return ScoredGroup(
        prompt=prompt(name=name),
        responses=tuple(rollouts),
        texts=("",) * len(rollouts),
        rewards=tuple(Reward(total=reward) for reward in rewards),
        margins=tuple(margins),
        labels=tuple(labels),
    )


def signals(
    example: Example, *, old: Sequence[float], values: Sequence[float], ref: Sequence[float] | None = None
) -> Signals:
    """What models said about the example's own tokens; every other position holds NaN."""

    def aligned(numbers: Sequence[float]) -> np.ndarray:
        array = np.full(len(example.sequences[0]), np.nan, dtype=np.float32)
        array[example.sequences[0].loss_mask] = numbers
        return array

    known = {Signal.OLD_LOG_PROBS: (aligned(old),), Signal.VALUES: (aligned(values),)}
    return known if ref is None else {**known, Signal.REF_LOG_PROBS: (aligned(ref),)}
