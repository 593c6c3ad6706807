"""The policy's loss over a packed micro-batch: a surrogate of ratios, an entropy bonus, and the KL to a reference."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, TypeAlias

import torch

from rlhf.algorithms.base import LossOutput, Outputs, TensorBatch
from rlhf.algorithms.importance import batch_weights
from rlhf.algorithms.kl import clamped_exp, kl_estimate, kl_loss, kl_to_old
from rlhf.algorithms.losses import (
    Weights,
    entropy_of,
    masked,
    old_log_probs_of,
    ppo_clip,
    ppo_penalty,
    present,
    sequence_sum,
    to_metrics,
    token_mean,
)
from rlhf.config.algo import Correction, NoCorrection
from rlhf.types import Signal


def each_token(log_ratio: torch.Tensor, batch: TensorBatch) -> torch.Tensor:
    """Every token is an action: its own log-ratio."""
    return log_ratio


def whole_sequence(log_ratio: torch.Tensor, batch: TensorBatch) -> torch.Tensor:
    """The response is one action: its tokens get log(policy(response) / old(response)) (DeepSeek-AI 2025, R1)."""
    return masked(sequence_sum(log_ratio, batch.lengths), batch.loss_mask)


def sequence_mean_ratio(log_ratio: torch.Tensor, batch: TensorBatch) -> torch.Tensor:
    """The same divided by the response's length: the log of a geometric mean (GSPO, Zheng et al. 2025)."""
    num_tokens = sequence_sum(batch.loss_mask.to(log_ratio.dtype), batch.lengths)
    return whole_sequence(log_ratio, batch) / num_tokens.clamp(min=1.0)


Ratio: TypeAlias = Callable[[torch.Tensor, TensorBatch], torch.Tensor]
"""Token log-ratios [T], 0 where not learned from -> those that the surrogate sees [T], 0 there too."""
RATIOS: Mapping[Literal["token", "sequence", "sequence-mean"], Ratio] = {
    "token": each_token,
    "sequence": whole_sequence,
    "sequence-mean": sequence_mean_ratio,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTokens:
    """What a surrogate sees. Tensors are [T], 0 where not learned from; `log_ratio` is log(policy / old) of the
    token, or of its whole response."""

    log_probs: torch.Tensor
    log_ratio: torch.Tensor
    advantages: torch.Tensor
    coefficients: Mapping[str, float]

    @property
    def ratio(self) -> torch.Tensor:
        return clamped_exp(self.log_ratio)


class Surrogate(Protocol):
    """What the policy's loss is made of."""

    def loss(self, tokens: PolicyTokens) -> torch.Tensor:
        """[T]: each token's loss."""
        ...

    def clipped(self, tokens: PolicyTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """[T], [T]: whether the clip acts on a token from below, and from above."""
        ...


@dataclass(frozen=True, slots=True)
class Clip:
    """PPO-clip; `dual` bounds the loss of a bad token at dual * |A|, however large its ratio (Ye et al. 2020)."""

    low: float
    high: float
    dual: float = 0.0

    def loss(self, tokens: PolicyTokens) -> torch.Tensor:
        loss = ppo_clip(tokens.log_ratio, tokens.advantages, self.low, self.high)
        return torch.minimum(loss, self.dual * tokens.advantages.abs()) if self.dual else loss

    def clipped(self, tokens: PolicyTokens) -> tuple[torch.Tensor, torch.Tensor]:
        low = (tokens.ratio < 1.0 - self.low) & (tokens.advantages < 0.0)
        return low, (tokens.ratio > 1.0 + self.high) & (tokens.advantages > 0.0)


@dataclass(frozen=True, slots=True)
class Penalty(Clip):
    """PPO-penalty; the bounds are only used for the metrics: what PPO-clip would have clipped."""

    def loss(self, tokens: PolicyTokens) -> torch.Tensor:
        return ppo_penalty(tokens.log_ratio, tokens.advantages, tokens.coefficients["penalty"])


@dataclass(frozen=True, slots=True)
class Cispo:
    """-sg(clip(ratio)) * A * log p: the clip bounds a token's weight, and takes no token's gradient (MiniMax 2025)."""

    low: float
    high: float

    def loss(self, tokens: PolicyTokens) -> torch.Tensor:
        weight = tokens.ratio.clamp(1.0 - self.low, 1.0 + self.high).detach()
        return -weight * tokens.advantages * tokens.log_probs

    def clipped(self, tokens: PolicyTokens) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens.ratio < 1.0 - self.low, tokens.ratio > 1.0 + self.high


class PolicyObjective:
    """Surrogate - c * entropy, plus beta * KL(policy || reference) where the KL acts in the loss."""

    def __init__(
        self,
        surrogate: Surrogate,
        *,
        weights: Weights,
        ratio: Ratio = each_token,
        entropy_coef: float = 0.0,
        kl: Literal["k2", "k3"] | None = None,
        limits: tuple[float, float] | None = None,
        correction: Correction | None = None,
    ) -> None:
        """`weights` make one number of the token losses; `kl` is the estimator of the KL in the loss, if it is there,
        whose weight is the batch's coefficient `kl`; `limits` clamp a token's log-ratio to the old policy; `correction`
        is that of the sampler, whose weights multiply the advantages."""
        self._correction = correction or NoCorrection()
        self._limits = limits or (-math.inf, math.inf)
        self._surrogate = surrogate
        self._weights = weights
        self._ratio = ratio
        self._entropy_coef = entropy_coef
        self._kl: Literal["k2", "k3"] | None = kl

    def __call__(self, outputs: Outputs, batch: TensorBatch) -> LossOutput:
        only = partial(masked, mask=batch.loss_mask)
        log_probs = only(outputs.predictions)
        old_log_probs = old_log_probs_of(outputs, batch)
        entropy = entropy_of(outputs, batch)
        tokens = PolicyTokens(
            log_probs=log_probs,
            log_ratio=self._ratio((log_probs - old_log_probs).clamp(*self._limits), batch),
            advantages=only(present(batch, Signal.ADVANTAGES)) * batch_weights(self._correction, old_log_probs, batch),
            coefficients=batch.coefficients,
        )
        surrogate = self._surrogate.loss(tokens)
        per_token = surrogate - self._entropy_coef * entropy
        clipped_low, clipped_high = self._surrogate.clipped(tokens)
        metrics = {
            "policy/surrogate": surrogate,
            "policy/entropy": entropy,
            "policy/ratio": tokens.ratio,
            "policy/approx_kl": kl_to_old(log_probs - old_log_probs),
            "policy/clip_frac": clipped_low | clipped_high,
            "policy/clipped_low": clipped_low,
            "policy/clipped_high": clipped_high,
        }
        if self._kl is not None:
            ref_log_probs = only(present(batch, Signal.REF_LOG_PROBS))
            kl = kl_loss(self._kl, log_probs, old_log_probs, ref_log_probs)
            per_token = per_token + batch.coefficients["kl"] * kl
            metrics["policy/kl_ref"] = kl_estimate(self._kl, log_probs, ref_log_probs)
        loss = (per_token * self._weights(batch)).sum()
        mean = token_mean(batch)
        sums = {"policy/loss": loss} | {name: (numbers * mean).sum() for name, numbers in metrics.items()}
        return LossOutput(loss=loss, metrics=to_metrics(sums, {"policy/ratio_max": tokens.ratio.max()}))
