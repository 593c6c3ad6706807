"""Settings of KTO, on given labels and on sampled answers."""

from typing import Literal

from pydantic import Field, FiniteFloat

from rlhf.config.algo.common import AlgorithmSection, Positive


class LabelLossSection(AlgorithmSection):
    """What KTO on given and on made labels share."""

    beta: Positive = 0.1
    """Weight of the distance from the reference: larger stays nearer."""
    desirable_weight: Positive = 1.0
    """Weight of good answers, for class_weights given."""
    undesirable_weight: Positive = 1.0
    """Weight of bad answers, for class_weights given."""
    humanline: bool = False
    """Clamp each token's log-ratio to the reference before it is summed (Liu et al. 2025, humanline)."""
    humanline_low: float = Field(-1.0, le=0.0, allow_inf_nan=False)
    """Lower end of that clamp."""
    humanline_high: float = Field(1.5, ge=0.0, allow_inf_nan=False)
    """Upper end of that clamp."""

    @property
    def uses_reference(self) -> bool:
        return True


class KtoSection(LabelLossSection):
    """Kahneman-Tversky optimization: answers that are good or bad, each by itself (Ethayarajh et al. 2024)."""

    type: Literal["kto"] = "kto"
    """KTO on given labels."""
    class_weights: Literal["auto", "given"] = "auto"
    """auto weighs the rarer label up until both count the same over the data set; given takes desirable_weight and
    undesirable_weight."""


class OnlineKtoSection(LabelLossSection):
    """KTO on the policy's own answers, each labeled by its score against a threshold."""

    type: Literal["online-kto"] = "online-kto"
    """KTO on sampled answers."""
    threshold: Literal["group-mean", "batch-mean", "fixed"] = "group-mean"
    """Score above which an answer is good: the mean of the prompt's answers, that of the whole batch, or a number. An
    answer exactly at a mean is left out, and counted."""
    threshold_score: FiniteFloat = 0.0
    """That number, for threshold fixed; an answer at it is good."""
    class_weights: Literal["auto", "given"] = "auto"
    """auto weighs the rarer label up until both count the same over the batch; given takes desirable_weight and
    undesirable_weight."""

    @property
    def is_one_update(self) -> bool:
        return True
