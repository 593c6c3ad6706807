"""Pairs of responses: selected from groups, with their log-probs, and read back from packed micro-batches."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import torch

from rlhf.algorithms.base import LossOutput, Outputs, TensorBatch
from rlhf.algorithms.losses import masked, present, sequence_totals, to_metrics, token_mean
from rlhf.algorithms.pair_losses import PAIR_LOSSES, Pairs, Side
from rlhf.algorithms.sequences import is_empty, join, learned, sampler_log_probs
from rlhf.config.algo import PairLossSection
from rlhf.errors import NumericsError
from rlhf.types import Example, Experience, FinishReason, FloatArray, Rollout, ScoredGroup, Signal

CHOSEN, REJECTED = 1.0, 0.0


class PairPicker:
    """The best response of each group against its worst: one pair per group of any size, so a step has as many
    examples as prompts. A group without such a pair is dropped and counted, by its reason:

    - empty: fewer than two responses hold a token to learn from. Aborted responses hold none.
    - tied: no two different responses have different rewards. Compared exactly: close is not equal.
    - identical: their rewards differ and their tokens do not (after truncation, say), so no policy could prefer one.
    """

    def __init__(self, *, from_policy: bool) -> None:
        """`from_policy`: the policy sampled the responses, so their sampler log-probs are kept for comparison."""
        self._from_policy = from_policy
        self._dropped: Counter[str] = Counter()

    def pick(self, groups: Sequence[ScoredGroup]) -> list[Example]:
        """One example of two sequences a group that has a pair, chosen first."""
        pairs = [(group, self._best_and_worst(group)) for group in groups]
        return [self._example(group, *found) for group, found in pairs if found is not None]

    def _best_and_worst(self, group: ScoredGroup) -> tuple[int, int] | None:
        rewards = [reward.total for reward in group.rewards]
        non_empty = [i for i, response in enumerate(group.responses) if not is_empty(group.prompt, response)]
        if len(non_empty) < 2:
            self._dropped["empty"] += 1
            return None
        best = max(non_empty, key=lambda i: rewards[i])
        token_ids = [response.token_ids for response in group.responses]
        others = [i for i in non_empty if not np.array_equal(token_ids[i], token_ids[best])]
        worst = min(others, key=lambda i: rewards[i], default=best)
        if rewards[worst] < rewards[best]:
            return best, worst
        only_same = not others and min(rewards[i] for i in non_empty) < rewards[best]
        self._dropped["identical" if only_same else "tied"] += 1
        return None

    def _example(self, group: ScoredGroup, *pair: int) -> Example:
        responses = [group.responses[i] for i in pair]
        log_probs = chain.from_iterable(sampler_log_probs(group.prompt, response) for response in responses)
        return Example(
            id=responses[0].id,
            sequences=tuple(join(group.prompt, response) for response in responses),
            rewards=tuple(group.rewards[i].total for i in pair),
            sampler_log_probs=tuple(log_probs) if self._from_policy else (),
            truncated=tuple(response.finish_reason is FinishReason.LENGTH for response in responses),
            weight_version=min((one.weight_version for one in responses if isinstance(one, Rollout)), default=None),
            group=group.prompt.id,
        )

    def dropped(self) -> dict[str, float]:
        """Counts of the pairs that were dropped since the last call."""
        counts, self._dropped = self._dropped, Counter()
        return {f"pairs/{reason}": float(counts[reason]) for reason in ("tied", "identical", "empty")}


def pair_experience(example: Example, ref_log_probs: Sequence[FloatArray]) -> Experience:
    """A pair with the reference's log-probs of each side; `ref_log_probs` is empty where the loss needs no reference.

    Raises NumericsError where one of them is NaN or inf at a token that is learned from.
    """
    for sequence, array in zip(example.sequences, ref_log_probs, strict=bool(ref_log_probs)):
        wrong = int((~np.isfinite(array[sequence.loss_mask])).sum())
        if wrong:
            raise NumericsError(f"{example.id}: ref_log_probs: {wrong} of {sequence.loss_mask.sum()} are not finite.")
    signals = [{Signal.REF_LOG_PROBS: array} for array in ref_log_probs] or [{}, {}]
    return Experience(
        id=example.id,
        sequences=tuple(learned(sequence, known) for sequence, known in zip(example.sequences, signals, strict=True)),
        targets=(CHOSEN, REJECTED),
    )


class PairObjective:
    """Mean loss over the step's pairs."""

    def __init__(self, loss: PairLossSection) -> None:
        self._section = loss
        self._loss = PAIR_LOSSES[loss.type]

    def __call__(self, outputs: Outputs, batch: TensorBatch) -> LossOutput:
        pairs, clamped = self.read(outputs.predictions, batch)
        num_pairs = max(batch.denominators.examples, 1.0)
        loss = self._loss(pairs, self._section).sum() / num_pairs
        metrics = {
            "policy/loss": loss,
            **{name: each.sum() / num_pairs for name, each in self._describe(pairs).items()},
        }
        if outputs.entropy is not None:
            metrics["policy/entropy"] = (masked(outputs.entropy, batch.loss_mask) * token_mean(batch)).sum()
        if self._section.humanline:
            metrics["pairs/clamped"] = (clamped * token_mean(batch)).sum()
        return LossOutput(loss=loss, metrics=to_metrics(metrics))

    def read(self, predictions: torch.Tensor, batch: TensorBatch) -> tuple[Pairs, torch.Tensor]:
        """The micro-batch's pairs from the policy's log-probs [T]; and [T], 1 where humanline clamped a log-ratio."""
        section, mask = self._section, batch.loss_mask
        log_probs = masked(predictions, mask)
        ref_log_probs = torch.zeros_like(log_probs)
        if section.uses_reference:
            ref_log_probs = masked(present(batch, Signal.REF_LOG_PROBS), mask)
        # Summed as differences: two sums of a thousand nats each would leave few digits for what they differ by.
        log_ratios = log_probs - ref_log_probs
        clamped = torch.zeros_like(log_ratios)
        if section.humanline:
            free, log_ratios = log_ratios, log_ratios.clamp(section.humanline_low, section.humanline_high)
            clamped, log_probs = (free != log_ratios).to(log_ratios.dtype), ref_log_probs + log_ratios
        lengths = sequence_totals(mask.to(log_probs.dtype), batch.lengths)
        divisor = lengths.clamp(min=1.0) if section.averages_tokens else torch.ones_like(lengths)
        sums = [sequence_totals(values, batch.lengths) / divisor for values in (log_probs, log_ratios)]

        def side(which: torch.Tensor) -> Side:
            return Side(log_probs=sums[0][which], log_ratios=sums[1][which], lengths=lengths[which])

        # Each example has one sequence of either kind, so both sides come in the examples' order.
        is_chosen = batch.targets == CHOSEN
        return Pairs(chosen=side(is_chosen), rejected=side(~is_chosen)), clamped

    def _describe(self, pairs: Pairs) -> Mapping[str, torch.Tensor]:
        """[P] metrics. Chosen and rejected apart: a margin may grow while both become less likely."""
        beta = self._section.beta
        return {
            "pairs/accuracy": (1.0 + pairs.h.sign()) / 2.0,
            "pairs/margin": beta * pairs.h,
            "pairs/chosen_reward": beta * pairs.chosen.log_ratios,
            "pairs/rejected_reward": beta * pairs.rejected.log_ratios,
            "pairs/chosen_log_prob": pairs.chosen.log_probs,
            "pairs/rejected_log_prob": pairs.rejected.log_probs,
        }
