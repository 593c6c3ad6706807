"""Reward model: Bradley-Terry over all pairs of a ranking (Ouyang et al. 2022, section 3.5), with margins (Touvron et
al. 2023, section 3.2.2)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from rlhf.algorithms.base import Algorithm, LossOutput, Objective, Outputs, TensorBatch
from rlhf.algorithms.losses import bradley_terry, to_metrics
from rlhf.algorithms.needs import rm_needs
from rlhf.algorithms.sequences import join, learned
from rlhf.config.algo import RmSection
from rlhf.types import Example, Experience, Metrics, Role, ScoredGroup, Signals


class RM(Algorithm):
    """-log sigmoid(R(better) - R(worse) - margin), the mean over all pairs of a prompt, then over prompts. All
    responses to a prompt are one example: a ranking of K costs K forward passes, not K * (K - 1).

    Ouyang et al. 2022, arXiv:2203.02155, section 3.5; margins: Touvron et al. 2023, arXiv:2307.09288, section 3.2.2.
    """

    def __init__(self, section: RmSection) -> None:
        self._use_margins = section.use_margins
        self._dropped_pairs = 0
        self.needs = rm_needs(section)

    def keep(self, group: ScoredGroup) -> bool:
        """Whether any two different responses are ordered."""
        return count_ordered_pairs(rank(group).rewards) > 0

    def select(self, groups: Sequence[ScoredGroup]) -> list[Example]:
        """One example a prompt that has an ordered pair; the pairs that have no order are counted."""
        examples = [rank(group) for group in groups]
        num_pairs = sum(len(group.responses) * (len(group.responses) - 1) // 2 for group in groups)
        self._dropped_pairs += num_pairs - sum(count_ordered_pairs(example.rewards) for example in examples)
        return [example for example in examples if count_ordered_pairs(example.rewards)]

    def credit(self, examples: Sequence[Example], signals: Sequence[Signals]) -> tuple[list[Experience], Metrics]:
        experiences = [
            Experience(
                id=example.id,
                sequences=tuple(map(learned, example.sequences)),
                targets=example.rewards,
                margins=example.margins if self._use_margins else (),
            )
            for example in examples
        ]
        dropped, self._dropped_pairs = self._dropped_pairs, 0
        return experiences, Metrics(sums={"pairs/dropped": float(dropped)})

    def objectives(self) -> Mapping[str, Objective]:
        return {Role.REWARD: self._reward_loss}

    def _reward_loss(self, outputs: Outputs, batch: TensorBatch) -> LossOutput:
        """Mean over the pairs of a prompt, then over the prompts of the step."""
        together = batch.example_index[:, None] == batch.example_index[None, :]
        ordered = batch.targets[:, None] > batch.targets[None, :]
        better, worse = torch.nonzero(together & ordered, as_tuple=True)
        scores = outputs.predictions.to(torch.promote_types(outputs.predictions.dtype, torch.float32))
        loss = bradley_terry(scores[better], scores[worse], batch.margins[worse] - batch.margins[better])
        example = batch.example_index[better]
        weights = 1.0 / (torch.bincount(example)[example] * max(batch.denominators.examples, 1.0))

        def over_pairs(numbers: torch.Tensor) -> torch.Tensor:
            return (numbers * weights).sum()

        total, gap = over_pairs(loss), scores[better] - scores[worse]
        metrics = {
            "reward/loss": total,
            "reward/accuracy": over_pairs((1.0 + gap.sign()) / 2.0),
            "reward/margin": over_pairs(gap),
            "reward/chosen": over_pairs(scores[better]),
            "reward/rejected": over_pairs(scores[worse]),
        }
        return LossOutput(loss=total, metrics=to_metrics(metrics))


def rank(group: ScoredGroup) -> Example:
    """The group's different responses, best first; of responses with equal token ids only the best is kept,
    since the model gives both the same score.

    Margins, given relative to the group's first response, are made relative to the best: the margin of any pair is
    then the difference of its two.
    """
    rewards = [reward.total for reward in group.rewards]
    against_first = (0.0, *(group.margins or (0.0,) * (len(rewards) - 1)))
    best_first = sorted(range(len(rewards)), key=lambda i: -rewards[i])
    kept = list({group.responses[i].token_ids.tobytes(): i for i in reversed(best_first)}.values())[::-1]
    return Example(
        id=group.prompt.id,
        sequences=tuple(join(group.prompt, group.responses[i]) for i in kept),
        rewards=tuple(rewards[i] for i in kept),
        margins=tuple(against_first[i] - against_first[kept[0]] for i in kept[1:]) if group.margins else (),
    )


def count_ordered_pairs(rewards: Sequence[float]) -> int:
    """How many pairs have a better and a worse side."""
    return sum(better > worse for better in rewards for worse in rewards)


def pair_accuracy(examples: Sequence[Example], scores: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Share of the ordered pairs of held-out rankings that a reward model's scores order alike, and their number.

    `scores[i]` are those of `examples[i].sequences`. Each pair counts once, whatever its ranking's length; equal
    scores count half, so that a model that knows nothing gets 0.5. Without pairs the share is 0.
    """
    correct, num_pairs = 0.0, 0
    for example, predicted in zip(examples, map(np.array, scores), strict=True):
        rewards = np.array(example.rewards)
        better, worse = np.nonzero(rewards[:, None] > rewards[None, :])
        correct += float(((1.0 + np.sign(predicted[better] - predicted[worse])) / 2.0).sum())
        num_pairs += len(better)
    return correct / max(num_pairs, 1), num_pairs
