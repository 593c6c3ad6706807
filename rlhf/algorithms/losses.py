"""Losses as pure functions on tensors.

Per-token losses are [T], a packed micro-batch end to end. Their sum is divided by *global* denominators, those of the
whole optimizer step, so the gradient does not depend on how the step was split.

Arithmetic is float32 or better. Inputs pass through `masked` first: positions outside the loss mask may hold NaN or
inf, which then reach neither the loss nor the gradient.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

import torch
from torch.nn.functional import logsigmoid

from rlhf.algorithms.base import Outputs, TensorBatch
from rlhf.algorithms.kl import clamped_exp, kl_to_old
from rlhf.types import Metrics, Signal

Weights: TypeAlias = Callable[[TensorBatch], torch.Tensor]
"""A micro-batch -> [T] weights of its tokens, 0 where not learned from."""


def masked(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`values` where `mask`, exactly 0 elsewhere, in float32 or better."""
    return torch.where(mask, values, 0.0).to(torch.promote_types(values.dtype, torch.float32))


def present(batch: TensorBatch, signal: Signal) -> torch.Tensor:
    """[T]: a signal that the loss needs. Raises ValueError where `credit` put none into its experiences."""
    if signal not in batch.signals:
        held = ", ".join(batch.signals) or "none"
        raise ValueError(f"the objective needs {signal}, which the batch does not hold (it holds {held})")
    return batch.signals[signal]


def old_log_probs_of(outputs: Outputs, batch: TensorBatch) -> torch.Tensor:
    """[T]: log-probs by the old policy, 0 where not learned from. In a first pass they are those of this very pass,
    without a gradient."""
    old = outputs.predictions.detach() if batch.is_first_pass else present(batch, Signal.OLD_LOG_PROBS)
    return masked(old, batch.loss_mask)


def entropy_of(outputs: Outputs, batch: TensorBatch) -> torch.Tensor:
    """[T]: the entropy at each token, 0 where not learned from. Raises ValueError where the head gives none."""
    if outputs.entropy is None:
        raise ValueError("the objective needs the entropy, which comes with the log_probs head only")
    return masked(outputs.entropy, batch.loss_mask)


def sequence_index(lengths: torch.Tensor) -> torch.Tensor:
    """[T]: which sequence each token belongs to."""
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def sequence_totals(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[T] -> [S]: the sum over each sequence; 0 where it has no token."""
    return values.new_zeros(len(lengths)).index_add(0, sequence_index(lengths), values)


def sequence_sum(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[T]: each token gets the sum over its sequence."""
    return sequence_totals(values, lengths)[sequence_index(lengths)]


def token_mean(batch: TensorBatch) -> torch.Tensor:
    """Every token of the step weighs the same."""
    return batch.loss_mask.float() / max(batch.denominators.tokens, 1.0)


def sequence_mean(batch: TensorBatch) -> torch.Tensor:
    """Every sequence of the step weighs the same: the 1/length of Shao et al. 2024."""
    mask = batch.loss_mask.float()
    return mask / (sequence_sum(mask, batch.lengths).clamp(min=1.0) * max(batch.denominators.sequences, 1.0))


def constant_length(batch: TensorBatch, constant: float) -> torch.Tensor:
    """A sequence weighs by its length: the sum over a constant (Dr. GRPO, Liu et al. 2025)."""
    return batch.loss_mask.float() / (constant * max(batch.denominators.sequences, 1.0))


def token_weights(aggregation: str, constant: float) -> Weights:
    """How token losses become one number: a weighted sum, with these weights."""
    choices: dict[str, Weights] = {
        "token-mean": token_mean,
        "seq-mean-token-mean": sequence_mean,
        "seq-mean-token-sum-norm": partial(constant_length, constant=constant),
    }
    return choices[aggregation]


def ppo_clip(log_ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float) -> torch.Tensor:
    """-min(ratio * A, clip(ratio) * A), any shape (Schulman et al. 2017, section 3). A bad action (A < 0) with a large
    ratio keeps its gradient. With ratios 1.5, 1.5, 0.5 and a clip to [0.8, 1.2]:

    >>> ppo_clip(torch.tensor([1.5, 1.5, 0.5]).log(), torch.tensor([2.0, -2.0, 2.0]), 0.2, 0.2)
    tensor([-2.4000,  3.0000, -1.0000])
    """
    ratio = clamped_exp(log_ratio)
    return -torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages)


def ppo_penalty(log_ratio: torch.Tensor, advantages: torch.Tensor, coef: float) -> torch.Tensor:
    """-(ratio * A - coef * KL(old || policy)) (Schulman et al. 2017, section 4)."""
    return coef * kl_to_old(log_ratio) - clamped_exp(log_ratio) * advantages


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, value_clip: float
) -> torch.Tensor:
    """max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2; c = 0 does not clip, which is c = infinity."""
    loss = (values - returns).square()
    if value_clip:
        clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
        loss = torch.maximum(loss, (clipped - returns).square())
    return loss / 2


def bradley_terry(better: torch.Tensor, worse: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
    """-log sigmoid(better - worse - margin): the negative log-likelihood of the preference."""
    return -logsigmoid(better - worse - margins)


def negative_log_likelihood(log_probs: torch.Tensor, batch: TensorBatch) -> torch.Tensor:
    """Mean over all of the step's loss tokens, a scalar; its exponential is the perplexity."""
    return -(masked(log_probs, batch.loss_mask) * token_mean(batch)).sum()


def to_metrics(sums: Mapping[str, torch.Tensor], maxima: Mapping[str, torch.Tensor] | None = None) -> Metrics:
    """Scalars on the device -> metrics, in one transfer."""
    maxima = maxima or {}
    numbers = torch.stack([value.detach().float() for value in (*sums.values(), *maxima.values())]).tolist()
    return Metrics(
        sums=dict(zip(sums, numbers, strict=False)),
        maxima=dict(zip(maxima, numbers[len(sums) :], strict=True)),
    )
