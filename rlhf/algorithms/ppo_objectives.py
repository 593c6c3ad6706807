"""PPO's two losses over a packed micro-batch."""

from functools import partial

import torch

from rlhf.algorithms.base import LossOutput, Outputs, TensorBatch
from rlhf.algorithms.kl import clamped_exp, kl_estimate, kl_loss, kl_to_old
from rlhf.algorithms.losses import (
    Weights,
    masked,
    measure,
    ppo_clip,
    ppo_penalty,
    present,
    sequence_sum,
    token_mean,
    token_weights,
    value_loss,
)
from rlhf.config.algo import PpoSection


class PolicyObjective:
    """Surrogate - c * entropy, plus beta * KL(policy || reference) where the KL acts in the loss."""

    def __init__(self, section: PpoSection) -> None:
        self._section = section
        self._aggregate = aggregation_of(section)

    def __call__(self, outputs: Outputs, batch: TensorBatch) -> LossOutput:
        section, only = self._section, partial(masked, mask=batch.loss_mask)
        log_probs = only(outputs.predictions)
        old_log_probs = only(present(batch.old_log_probs, "old_log_probs"))
        advantages = only(present(batch.advantages, "advantages"))
        entropy = only(present(outputs.entropy, "entropy"))
        token_log_ratio = log_probs - old_log_probs
        log_ratio = token_log_ratio
        if not section.token_level:
            log_ratio = only(sequence_sum(token_log_ratio, batch.lengths))
        surrogate = self._surrogate(log_ratio, advantages, batch)
        per_token = surrogate - section.entropy_coef * entropy
        ratio = clamped_exp(log_ratio)
        figures = {
            "policy/surrogate": surrogate,
            "policy/entropy": entropy,
            "policy/ratio": ratio,
            "policy/approx_kl": kl_to_old(token_log_ratio),
            "policy/clipped_low": (ratio < 1.0 - section.clip_low) & (advantages < 0.0),
            "policy/clipped_high": (ratio > 1.0 + section.clip_high) & (advantages > 0.0),
        }
        if section.uses_reference and section.kl_placement == "loss" and section.estimator != "k1":
            ref_log_probs = only(present(batch.ref_log_probs, "ref_log_probs"))
            kl = kl_loss(section.estimator, log_probs, old_log_probs, ref_log_probs)
            per_token = per_token + batch.coefficients["kl"] * kl
            figures["policy/kl_ref"] = kl_estimate(section.estimator, log_probs, ref_log_probs)
        loss = (per_token * self._aggregate(batch)).sum()
        mean = token_mean(batch)
        sums = {"policy/loss": loss} | {name: (numbers * mean).sum() for name, numbers in figures.items()}
        return LossOutput(loss=loss, metrics=measure(sums, {"policy/ratio_max": ratio.max()}))

    def _surrogate(self, log_ratio: torch.Tensor, advantages: torch.Tensor, batch: TensorBatch) -> torch.Tensor:
        if self._section.loss == "penalty":
            return ppo_penalty(log_ratio, advantages, batch.coefficients["penalty"])
        return ppo_clip(log_ratio, advantages, self._section.clip_low, self._section.clip_high)


class ValueObjective:
    """Squared distance of the value from the return, clipped around the old value."""

    def __init__(self, section: PpoSection) -> None:
        self._clip = section.value_clip
        self._aggregate = aggregation_of(section)

    def __call__(self, outputs: Outputs, batch: TensorBatch) -> LossOutput:
        only = partial(masked, mask=batch.loss_mask)
        values = only(outputs.predictions)
        old_values, returns = only(present(batch.old_values, "old_values")), only(present(batch.returns, "returns"))
        loss = (value_loss(values, old_values, returns, self._clip) * self._aggregate(batch)).sum()
        figures = {
            "critic/value": values,
            "critic/clipped": ((values - old_values).abs() > self._clip) & (self._clip > 0.0),
        }
        mean = token_mean(batch)
        sums = {"critic/loss": loss} | {name: (numbers * mean).sum() for name, numbers in figures.items()}
        return LossOutput(loss=loss, metrics=measure(sums))


def aggregation_of(section: PpoSection) -> Weights:
    """Token weights of the section. Where a whole answer is one action, all answers weigh the same."""
    if not section.token_level:
        return token_weights("seq-mean-token-mean", 1.0)
    return token_weights(section.aggregation, section.aggregation_tokens)
