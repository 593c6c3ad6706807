"""Settings of KTO, on given labels and on sampled responses."""

from typing import Literal

from pydantic import Field, FiniteFloat

from rlhf.config.algo.common import AlgorithmSection, Positive


class LabelLossSection(AlgorithmSection):
    """What offline and online KTO share."""

    beta: Positive = 0.1
    """Strength of the pull to the reference: a larger beta stays closer to it."""
    desirable_weight: Positive = 1.0
    """Weight of good responses, with class_weights given."""
    undesirable_weight: Positive = 1.0
    """Weight of bad responses, with class_weights given."""
    humanline: bool = False
    """Clamp each token's log-ratio to the reference before summing (Liu et al. 2025, humanline)."""
    humanline_low: float = Field(-1.0, le=0.0, allow_inf_nan=False)
    """Lower bound of that clamp."""
    humanline_high: float = Field(1.5, ge=0.0, allow_inf_nan=False)
    """Upper bound of that clamp."""

    @property
    def uses_reference(self) -> bool:
        return True


class KtoSection(LabelLossSection):
    """Kahneman-Tversky optimization: single responses that are good or bad (Ethayarajh et al. 2024)."""

    type: Literal["kto"] = "kto"
    """KTO on given labels."""
    class_weights: Literal["auto", "given"] = "auto"
    """auto increases the weight of the rarer label until both count the same over the data set; given takes
    desirable_weight and undesirable_weight."""


class OnlineKtoSection(LabelLossSection):
    """KTO on the policy's own responses, each labeled by comparing its score with a threshold."""

    type: Literal["online-kto"] = "online-kto"
    """KTO on sampled responses."""
    threshold: Literal["group-mean", "batch-mean", "fixed"] = "group-mean"
    """Score above which a response is good: the mean of the prompt's responses, the mean of the whole batch, or a
    number. A response exactly at a mean is left out, and counted."""
    threshold_score: FiniteFloat = 0.0
    """That number, for threshold fixed; a response exactly at it is good."""
    class_weights: Literal["auto", "given"] = "auto"
    """auto increases the weight of the rarer label until both count the same over the batch; given takes
    desirable_weight and undesirable_weight."""
    max_class_weight: float = Field(4.0, ge=1.0, allow_inf_nan=False)
    """Largest weight that auto gives: where almost all responses of a batch have one label, the few others would
    otherwise decide the update."""

    @property
    def is_one_update(self) -> bool:
        return True
