"""Kahneman-Tversky optimization: each response is labeled good or bad, without pairs (Ethayarajh et al.
2024, arXiv:2402.01306)."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from rlhf.algorithms.advantages import Floats
from rlhf.algorithms.base import Algorithm, LossOutput, Objective, Outputs, TensorBatch
from rlhf.algorithms.losses import entropy_of, masked, present, sequence_totals, to_metrics, token_mean
from rlhf.algorithms.mismatched_responses import LabeledResponse, with_mismatched
from rlhf.algorithms.needs import kto_needs
from rlhf.algorithms.responses import mean
from rlhf.algorithms.sequences import is_empty, learned
from rlhf.config.algo import KtoSection, OnlineKtoSection
from rlhf.errors import NumericsError
from rlhf.types import (
    Example,
    Experience,
    Metrics,
    Role,
    ScoredGroup,
    Signal,
    Signals,
)

ADVISED = (1.0, 4 / 3)
"""Advised range of total weight of good responses / that of bad ones (Ethayarajh et al. 2024, section 4.2)."""
ROUNDING = 1e-9

Bools: TypeAlias = npt.NDArray[np.bool_]


class KTO(Algorithm):
    """1 - sigmoid(beta * (LR - z0)) for a good response, 1 - sigmoid(beta * (z0 - LR)) for a bad one, each times the
    weight of its label; the mean over the responses of the step. LR = log(policy / reference) of the whole response;
    z0 = max(0, mean LR of mismatched prompts and responses): how far the policy has moved in general.

    z0 is estimated on the driver, over the whole optimizer step, with the policy before it. It is one number for every
    micro-batch and rank, and has no gradient. It is 0 where a step has only one prompt. A step whose responses all have
    the same label is trained on like any other: each response has its own loss.

    Ethayarajh et al. 2024, arXiv:2402.01306.
    """

    def __init__(self, section: KtoSection | OnlineKtoSection) -> None:
        self._section = section
        free = (-np.inf, np.inf)
        self._limits = (section.humanline_low, section.humanline_high) if section.humanline else free
        self.needs = kto_needs(section)

    def keep(self, group: ScoredGroup) -> bool:
        """Whether there is anything to learn from."""
        return any(not is_empty(group.prompt, response) for response in group.responses)

    def select(self, groups: Sequence[ScoredGroup]) -> list[Example]:
        """One example per response, with the data set's label."""
        labeled = [
            LabeledResponse(prompt=group.prompt, response=response, score=reward.total, label=label)
            for group in groups
            for response, reward, label in zip(group.responses, group.rewards, group.labels, strict=True)
        ]
        return with_mismatched(labeled)

    def credit(self, examples: Sequence[Example], signals: Sequence[Signals]) -> tuple[list[Experience], Metrics]:
        """Estimate z0 and the class weights; label each response."""
        labels = np.array([label_of(example) for example in examples], dtype=np.bool_)
        log_ratios = [self._log_ratio(example, signal, 0) for example, signal in zip(examples, signals, strict=True)]
        mismatched = [
            self._log_ratio(example, signal, 1)
            for example, signal in zip(examples, signals, strict=True)
            if len(example.sequences) > 1 and example.sequences[1].loss_mask.any()
        ]
        z0 = max(mean(mismatched), 0.0)
        desirable, undesirable = self._class_weights(labels)
        coefficients = {"z0": z0, "desirable": desirable, "undesirable": undesirable}
        experiences = [
            Experience(
                id=example.id,
                sequences=(learned(example.sequences[0], {Signal.REF_LOG_PROBS: signal[Signal.REF_LOG_PROBS][0]}),),
                targets=(float(label),),
                coefficients=coefficients,
            )
            for example, signal, label in zip(examples, signals, labels, strict=True)
        ]
        losses = kto(
            torch.tensor(log_ratios, dtype=torch.float64), torch.tensor(labels), z0=z0, beta=self._section.beta
        ).numpy()
        log_probs = [
            float(learned_tokens(example, signal, Signal.OLD_LOG_PROBS, 0).sum())
            for example, signal in zip(examples, signals, strict=True)
        ]
        sums = {
            "kto/loss": mean(np.where(labels, desirable, undesirable) * losses),
            "kto/z0": z0,
            "kto/mismatched": float(len(mismatched)),
            "kto/desirable_weight": desirable,
            "kto/undesirable_weight": undesirable,
        }
        sums |= describe_labels(labels, self._section.beta * np.array(log_ratios), np.array(log_probs))
        return experiences, Metrics(sums=sums)

    def _log_ratio(self, example: Example, signals: Signals, index: int) -> float:
        """log(policy / reference) of one of the example's responses, in nats, by the policy before the step."""
        old = learned_tokens(example, signals, Signal.OLD_LOG_PROBS, index)
        ref = learned_tokens(example, signals, Signal.REF_LOG_PROBS, index)
        return float((old - ref).clip(*self._limits).sum())

    def _class_weights(self, labels: Bools) -> tuple[float, float]:
        section = self._section
        if section.class_weights == "given":
            return section.desirable_weight, section.undesirable_weight
        limit = section.max_class_weight if isinstance(section, OnlineKtoSection) else np.inf
        desirable, undesirable = balance(int(labels.sum()), int((~labels).sum()))
        return min(desirable, limit), min(undesirable, limit)

    def objectives(self) -> Mapping[str, Objective]:
        return {Role.POLICY: self._policy_loss}

    def _policy_loss(self, outputs: Outputs, batch: TensorBatch) -> LossOutput:
        """Mean over the step's responses."""
        given, mask = batch.coefficients, batch.loss_mask
        ref_log_probs = masked(present(batch, Signal.REF_LOG_PROBS), mask)
        by_token = (masked(outputs.predictions, mask) - ref_log_probs).clamp(*self._limits)
        log_ratios = sequence_totals(by_token, batch.lengths)
        desirable = batch.targets > 0.5
        weights = torch.where(desirable, given["desirable"], given["undesirable"])
        losses = weights * kto(log_ratios, desirable, z0=given["z0"], beta=self._section.beta)
        loss = losses.sum() / max(batch.denominators.examples, 1.0)
        entropy = entropy_of(outputs, batch) * token_mean(batch)
        return LossOutput(loss=loss, metrics=to_metrics({"policy/loss": loss, "policy/entropy": entropy.sum()}))


def kto(log_ratios: torch.Tensor, desirable: torch.Tensor, *, z0: float, beta: float) -> torch.Tensor:
    """[S] log(policy / reference) of whole responses, [S] labels -> [S] losses in (0, 1): equation 8 of the paper.

    1 - sigmoid(beta * (log_ratio - z0)) for a good response, 1 - sigmoid(beta * (z0 - log_ratio)) for a bad one.
    """
    ahead = beta * (log_ratios - z0)
    return torch.sigmoid(torch.where(desirable, -ahead, ahead))


def balance(num_desirable: int, num_undesirable: int) -> tuple[float, float]:
    """Weights of good and of bad responses that make both labels count the same: the rarer one is weighed up. Where one
    label is missing, both weights are 1."""
    if not num_desirable or not num_undesirable:
        return 1.0, 1.0
    most = max(num_desirable, num_undesirable)
    return most / num_desirable, most / num_undesirable


def imbalance(section: KtoSection | OnlineKtoSection, good: int, bad: int) -> str | None:
    """A warning where given weights do not balance this many good and bad responses."""
    low, high = ADVISED
    share = section.desirable_weight * good / max(section.undesirable_weight * bad, ROUNDING)
    if low - ROUNDING <= share <= high + ROUNDING:
        return None
    return (
        f"algo.desirable_weight, algo.undesirable_weight: {good} good responses weigh {share:.3g} times as much "
        f"as {bad} bad ones; 1 to 1.33 is advised. Use algo.class_weights=auto."
    )


def label_of(example: Example) -> bool:
    """Whether the response is desirable. Raises ValueError where `select` gave no label."""
    if example.label is None:
        raise ValueError(f"{example.id}: KTO learns from labeled responses, and this one has no label")
    return example.label


def learned_tokens(example: Example, signals: Signals, signal: Signal, index: int) -> Floats:
    """[n]: a signal at the n learned tokens of one response. Raises NumericsError where one is NaN or inf."""
    numbers = signals[signal][index][example.sequences[index].loss_mask].astype(np.float64)
    wrong = len(numbers) - int(np.isfinite(numbers).sum())
    if wrong:
        raise NumericsError(f"{example.id}: {signal}: {wrong} of {len(numbers)} tokens are not finite.")
    return numbers


def describe_labels(labels: Bools, rewards: Floats, log_probs: Floats) -> dict[str, float]:
    """Metrics of good and of bad responses, where there are any: implicit rewards, log-probs, and how well the implicit
    reward separates the two (area under the ROC curve; equal rewards count half)."""
    sums = {"labels/desirable": mean(labels), "labels/one_sided": float(labels.all() or not labels.any())}
    for name, of_label in (("desirable", labels), ("undesirable", ~labels)):
        if of_label.any():
            sums[f"labels/{name}_reward"] = mean(rewards[of_label])
            sums[f"labels/{name}_log_prob"] = mean(log_probs[of_label])
    if labels.any() and not labels.all():
        gaps = rewards[labels][:, None] - rewards[~labels][None, :]
        sums["labels/margin"] = mean(gaps)
        sums["labels/auc"] = mean((1.0 + np.sign(gaps)) / 2.0)
    return sums
