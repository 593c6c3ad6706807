"""Process reward model: whether each step of a response is right (Lightman et al. 2023, arXiv:2305.20050)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from rlhf.algorithms.advantages import Floats
from rlhf.algorithms.base import Algorithm, LossOutput, Objective, Outputs, TensorBatch
from rlhf.algorithms.losses import masked, present, to_metrics, token_mean
from rlhf.algorithms.needs import prm_needs
from rlhf.algorithms.responses import mean
from rlhf.algorithms.sequences import after_prompt, is_empty, join, learned
from rlhf.config.algo import PrmSection
from rlhf.types import (
    Example,
    Experience,
    FloatArray,
    Metrics,
    Prompt,
    Response,
    Role,
    ScoredGroup,
    Signal,
    Signals,
)


class PRM(Algorithm):
    """-(label * log sigmoid(s) + (1 - label) * log(1 - sigmoid(s))) at the last token of each step, the mean over all
    steps of the optimizer step: the score s is the log-odds that the step is right. As a source of rewards
    (`type: prm`), a response's steps are made one number by their minimum, mean, product, or the last.

    Lightman et al. 2023, arXiv:2305.20050; soft labels: Wang et al. 2024, arXiv:2312.08935.
    """

    def __init__(self, section: PrmSection) -> None:
        self.needs = prm_needs(section)

    def keep(self, group: ScoredGroup) -> bool:
        """Whether any step is labeled."""
        return any(has_labeled_step(group.prompt, response) for response in group.responses)

    def select(self, groups: Sequence[ScoredGroup]) -> list[Example]:
        """One example per response with labeled steps."""
        return [
            Example(
                id=response.id,
                sequences=(join(group.prompt, response),),
                rewards=(reward.total,),
                token_targets=(step_targets(group.prompt, response),),
            )
            for group in groups
            for response, reward in zip(group.responses, group.rewards, strict=True)
            if has_labeled_step(group.prompt, response)
        ]

    def credit(self, examples: Sequence[Example], signals: Sequence[Signals]) -> tuple[list[Experience], Metrics]:
        """The labels are the targets; nothing is computed from the batch."""
        experiences = [
            Experience(
                id=example.id,
                sequences=(learned(sequence, {Signal.TOKEN_TARGETS: targets}),),
            )
            for example in examples
            for sequence, targets in zip(example.sequences, example.token_targets, strict=True)
        ]
        masks = [example.sequences[0].loss_mask for example in examples]
        targets = [example.token_targets[0][mask] for example, mask in zip(examples, masks, strict=True)]
        labels = np.concatenate([*targets, np.zeros(0)])
        sums = {"steps/good": mean(labels), "steps/per_response": len(labels) / max(len(examples), 1)}
        return experiences, Metrics(sums=sums)

    def objectives(self) -> Mapping[str, Objective]:
        return {Role.REWARD: self._reward_loss}

    def _reward_loss(self, outputs: Outputs, batch: TensorBatch) -> LossOutput:
        """Mean over all steps of all responses."""
        scores = masked(outputs.predictions, batch.loss_mask)
        labels = masked(present(batch, Signal.TOKEN_TARGETS), batch.loss_mask).to(scores.dtype)
        weights = token_mean(batch).to(scores.dtype)
        loss = (step_loss(scores, labels) * weights).sum()
        agrees = (1.0 + scores.sign() * (labels - 0.5).sign()) / 2.0
        return LossOutput(
            loss=loss, metrics=to_metrics({"reward/loss": loss, "reward/accuracy": (agrees * weights).sum()})
        )


def step_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-(label * log sigmoid(score) + (1 - label) * log(1 - sigmoid(score))), any shape; labels from 0 to 1."""
    return binary_cross_entropy_with_logits(scores, labels, reduction="none")


def has_labeled_step(prompt: Prompt, response: Response) -> bool:
    """Whether any step is labeled."""
    return response.step_labels is not None and not is_empty(prompt, response)


def step_targets(prompt: Prompt, response: Response) -> FloatArray:
    """[n], aligned with prompt and response: each step's label at the step's last token, 0 elsewhere."""
    targets = np.zeros(len(response.token_ids), dtype=np.float32)
    if response.step_labels is not None:
        targets[response.loss_mask] = response.step_labels
    return after_prompt(prompt, targets)


def judge_steps(scores: Sequence[Floats], labels: Sequence[Floats]) -> dict[str, float]:
    """How well scores of held-out responses' steps agree with their labels. Each step counts once in accuracy and loss,
    a score of 0 half; each response once in `first_error`: whether the first wrong step, or that there is none, was
    found."""
    all_scores, known = np.concatenate(scores), np.concatenate(labels)
    agrees = (1.0 + np.sign(all_scores) * np.sign(known - 0.5)) / 2.0
    found = [first_error(s > 0) == first_error(k > 0.5) for s, k in zip(scores, labels, strict=True)]
    return {
        "accuracy": mean(agrees),
        "loss": mean(np.logaddexp(0.0, all_scores) - known * all_scores),
        "first_error": mean(found),
        "num_steps": float(len(all_scores)),
    }


def first_error(is_right: np.ndarray) -> int:
    """Index of the first wrong step; -1 where all are right."""
    wrong = np.flatnonzero(~is_right)
    return int(wrong[0]) if len(wrong) else -1
