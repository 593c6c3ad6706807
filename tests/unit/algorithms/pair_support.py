"""Pairs with numbers of one's own, for the tests of the losses on them."""

from collections.abc import Sequence

import numpy as np
import torch

from rlhf.algorithms.base import Outputs, TensorBatch
from rlhf.algorithms.pair_losses import Pairs, Side
from rlhf.algorithms.pairs import PairObjective, pair_experience
from rlhf.config.algo import PairLossSection
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, plan_batches
from rlhf.types import Example, Experience, Metrics, Role, TokenSequence

PROMPT = 2
"""Tokens of every prompt."""
CPU = torch.device("cpu")


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def pairs(
    policy: tuple[float, float], ref: tuple[float, float] = (0.0, 0.0), lengths: tuple[float, float] = (1.0, 1.0)
) -> Pairs:
    """One pair by what policy and reference say about chosen and rejected."""
    sides = [
        Side(log_probs=(lp := numbers(policy[i])), log_ratios=lp - ref[i], lengths=torch.tensor([lengths[i]]))
        for i in (0, 1)
    ]
    return Pairs(chosen=sides[0], rejected=sides[1])


def pair(name: str, num_chosen: int, num_rejected: int) -> Example:
    """A pair of answers of so many tokens."""

    def sequence(length: int, first: int) -> TokenSequence:
        mask = np.array([False] * PROMPT + [True] * length)
        return TokenSequence(token_ids=np.arange(first, first + PROMPT + length), loss_mask=mask)

    return Example(id=name, sequences=(sequence(num_chosen, 10), sequence(num_rejected, 50)), rewards=(1.0, 0.0))


def experience(example: Example, ref: Sequence[Sequence[float]] | None) -> Experience:
    """The pair with the reference's log-probs of its answers' tokens; NaN wherever nothing is learned from."""
    if ref is None:
        return pair_experience(example, ())
    return pair_experience(example, [np.array([np.nan] * PROMPT + list(side), dtype=np.float32) for side in ref])


def learn(
    section: PairLossSection,
    experiences: Sequence[Experience],
    said: Sequence[Sequence[torch.Tensor]],
    *,
    limits: MicroBatchLimits | None = None,
) -> tuple[torch.Tensor, Metrics]:
    """The step's loss and figures over the micro-batches of a plan. `said[i]` are the policy's log-probs of the tokens
    of experience i's two answers; it says NaN about everything else."""
    objective = PairObjective(section)
    total, metrics = torch.zeros((), dtype=torch.float64), Metrics()
    plan = plan_batches(experiences, limits or MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=10_000))
    for members, batch in zip(plan.micro_batches, build_batches(plan, experiences, Role.POLICY), strict=True):
        if batch.is_padding:
            continue
        unsaid = torch.full((PROMPT,), torch.nan, dtype=torch.float64)
        predictions = torch.cat([part for i in members for side in said[i] for part in (unsaid, side)])
        entropy = torch.where(predictions.isnan(), torch.nan, 2.0).detach()
        got = objective(Outputs(predictions=predictions, entropy=entropy), TensorBatch.from_numpy(batch, CPU))
        total, metrics = total + got.loss, metrics + got.metrics
    return total, metrics
