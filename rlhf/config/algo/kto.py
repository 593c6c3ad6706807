"""Settings of KTO, on given labels and on sampled answers."""

from typing import Literal

from pydantic import FiniteFloat

from rlhf.config.algo.common import AlgorithmSection, Positive


class KtoSection(AlgorithmSection):
    """Kahneman-Tversky optimisation: answers that are good or bad, each by itself (Ethayarajh et al. 2024)."""

    type: Literal["kto"] = "kto"
    """KTO on given labels."""
    beta: Positive = 0.1
    """Weight of the distance from the reference: larger stays nearer."""
    class_weights: Literal["auto", "given"] = "auto"
    """auto weighs the rarer label up until both count the same over the data set; given takes the two weights below."""
    desirable_weight: Positive = 1.0
    """Weight of good answers, for class_weights given."""
    undesirable_weight: Positive = 1.0
    """Weight of bad answers, for class_weights given."""

    @property
    def uses_reference(self) -> bool:
        return True


class OnlineKtoSection(AlgorithmSection):
    """KTO on the policy's own answers, each labelled by its score against a threshold."""

    type: Literal["online-kto"] = "online-kto"
    """KTO on sampled answers."""
    beta: Positive = 0.1
    """Weight of the distance from the reference: larger stays nearer."""
    threshold: Literal["group-mean", "batch-mean", "fixed"] = "group-mean"
    """Score above which an answer is good: the mean of the prompt's answers, that of the whole batch, or a number. An
    answer exactly at it is left out, and counted."""
    threshold_score: FiniteFloat = 0.0
    """That number, for threshold fixed; an answer at it is good."""
    class_weights: Literal["auto", "given"] = "auto"
    """auto weighs the rarer label up until both count the same over the batch; given takes the two weights below."""
    desirable_weight: Positive = 1.0
    """Weight of good answers, for class_weights given."""
    undesirable_weight: Positive = 1.0
    """Weight of bad answers, for class_weights given."""

    @property
    def uses_reference(self) -> bool:
        return True
