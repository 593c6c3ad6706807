"""PPO's two losses over a packed micro-batch, as its section describes them."""

from functools import partial
from typing import Literal

from rlhf.algorithms.base import LossOutput, Outputs, TensorBatch
from rlhf.algorithms.losses import Weights, masked, present, to_metrics, token_mean, token_weights, value_loss
from rlhf.algorithms.policy_loss import RATIOS, Clip, Penalty, PolicyObjective, Surrogate
from rlhf.config.algo import CriticFreeSection, PpoSection
from rlhf.types import Signal


def policy_objective(section: PpoSection) -> PolicyObjective:
    """The policy's loss."""
    bounds = section.clip_low, section.clip_high
    surrogate: Surrogate = Penalty(*bounds) if section.loss == "penalty" else Clip(*bounds, section.dual_clip)
    return PolicyObjective(
        surrogate,
        weights=aggregation_of(section),
        ratio=RATIOS["token" if section.token_level else "sequence"],
        entropy_coef=section.entropy_coef,
        kl=kl_in_loss(section),
        limits=section.log_ratio_limits,
        correction=section.correction,
    )


def kl_in_loss(section: PpoSection | CriticFreeSection) -> Literal["k2", "k3"] | None:
    """The estimator of the KL in the loss; None where the KL acts elsewhere or not at all. k1, which has no gradient
    there, is refused where settings are checked."""
    if section.uses_reference and section.kl_placement == "loss" and section.estimator != "k1":
        return section.estimator
    return None


class ValueObjective:
    """Squared distance of the value from the return, clipped around the old value."""

    def __init__(self, section: PpoSection) -> None:
        self._clip = section.value_clip
        self._aggregate = aggregation_of(section)

    def __call__(self, outputs: Outputs, batch: TensorBatch) -> LossOutput:
        only = partial(masked, mask=batch.loss_mask)
        values = only(outputs.predictions)
        old_values = only(present(batch, Signal.VALUES))
        returns = only(present(batch, Signal.RETURNS))
        loss = (value_loss(values, old_values, returns, self._clip) * self._aggregate(batch)).sum()
        metrics = {
            "critic/value": values,
            "critic/clipped": ((values - old_values).abs() > self._clip) & (self._clip > 0.0),
        }
        mean = token_mean(batch)
        sums = {"critic/loss": loss} | {name: (numbers * mean).sum() for name, numbers in metrics.items()}
        return LossOutput(loss=loss, metrics=to_metrics(sums))


def aggregation_of(section: PpoSection) -> Weights:
    """Token weights of the section. Where a whole response is one action, all responses weigh the same."""
    if not section.token_level:
        return token_weights("seq-mean-token-mean", 1.0)
    return token_weights(section.aggregation, section.aggregation_tokens)
