"""Kullback-Leibler divergence: estimators from sampled tokens, their use as a loss, and how the coefficient moves."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch

from rlhf.algorithms.state import number
from rlhf.config.algo import AdaptiveKl, FixedKl
from rlhf.types import Json

Estimator: TypeAlias = Literal["k1", "k2", "k3"]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this magnitude before `exp`, which then stays finite in float32, and so do its products."""


def clamped_exp(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp, finite for any finite input; exactly 1 at 0."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def kl_estimate(estimator: Estimator, log_probs: torch.Tensor, ref_log_probs: torch.Tensor) -> torch.Tensor:
    """Per-token estimates of KL(policy || ref) from tokens that the policy sampled (Schulman 2020), any shape.

    With d = log_probs - ref_log_probs: k1 = d is unbiased; k2 = d^2 / 2 is biased, of low variance; k3 = e^-d - 1 + d
    is unbiased and never negative.
    """
    d = log_probs - ref_log_probs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    clamped = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(-clamped) + clamped


def kl_loss(
    estimator: Literal["k2", "k3"], log_probs: torch.Tensor, old_log_probs: torch.Tensor, ref_log_probs: torch.Tensor
) -> torch.Tensor:
    """Per-token loss whose expected gradient is that of KL(policy || ref), over tokens that the *old* policy sampled.

    Differentiating an estimator alone is not enough: k1's gradient is 0 in expectation, k3's is that of
    KL(ref || policy), and every one forgets that the samples come from the old policy. The ratio to the old policy
    corrects both: k3 carries it inside the gradient (as DeepSeek-V3.2 does), k2 outside.
    """
    ratio = clamped_exp(log_probs - old_log_probs)
    if estimator == "k2":
        return ratio.detach() * kl_estimate("k2", log_probs, ref_log_probs)
    return ratio * kl_estimate("k3", log_probs, ref_log_probs)


def kl_to_old(log_ratio: torch.Tensor) -> torch.Tensor:
    """Estimates of KL(old || policy) from what the old policy sampled, given log(policy / old): k3, whose gradient is
    exact here because the samples do not depend on the policy."""
    return kl_estimate("k3", torch.zeros_like(log_ratio), log_ratio)


class KlController(Protocol):
    """Holds the KL coefficient of the current step."""

    coef: float

    def update(self, kl: float, num_responses: int) -> None:
        """Adapt to the mean KL per response, in nats, over `num_responses` responses."""
        ...

    def state(self) -> dict[str, Json]: ...

    def restore(self, state: Mapping[str, Json]) -> None: ...


@dataclass
class FixedKlController:
    """The coefficient of the config, which never changes."""

    coef: float

    def update(self, kl: float, num_responses: int) -> None:
        pass

    def state(self) -> dict[str, Json]:
        return {}

    def restore(self, state: Mapping[str, Json]) -> None:
        pass


@dataclass
class AdaptiveKlController:
    """The coefficient moves in proportion to the relative distance from the target, by a fifth of it at most over
    `horizon` responses (Ziegler et al. 2019, section 2.2)."""

    coef: float
    target: float
    horizon: int

    def update(self, kl: float, num_responses: int) -> None:
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        # A batch above the horizon counts as the horizon: the factor could turn negative otherwise.
        self.coef *= 1.0 + error * min(num_responses / self.horizon, 1.0)

    def state(self) -> dict[str, Json]:
        return {"kl_coef": self.coef}

    def restore(self, state: Mapping[str, Json]) -> None:
        # A checkpoint of a fixed coefficient holds none.
        self.coef = number({"kl_coef": self.coef, **state}, "kl_coef")


def kl_controller(section: FixedKl | AdaptiveKl) -> KlController:
    """The controller that a config section describes."""
    if isinstance(section, AdaptiveKl):
        return AdaptiveKlController(coef=section.coef, target=section.target, horizon=section.horizon)
    return FixedKlController(coef=section.coef)


@dataclass
class PenaltyController:
    """The coefficient of PPO-penalty (Schulman et al. 2017, section 4): after an update whose KL to the old policy,
    in nats per token, is below target / 1.5 it is halved, above 1.5 * target doubled."""

    coef: float
    target: float
    last_kl: float | None = None
    """KL seen in the latest pass over the batch of the update under way."""

    def observe(self, kl: float) -> None:
        """Note the KL of one more pass; the last one counts."""
        self.last_kl = kl

    def start_update(self) -> float:
        """The coefficient for a new update, adapted to how the last one ended."""
        if self.last_kl is not None:
            if self.last_kl < self.target / 1.5:
                self.coef /= 2
            elif self.last_kl > self.target * 1.5:
                self.coef *= 2
            # Bounded, so that a long quiet stretch can be undone.
            self.coef = min(max(self.coef, 1e-6), 1e6)
            self.last_kl = None
        return self.coef

    def state(self) -> dict[str, Json]:
        return {"penalty_coef": self.coef, "penalty_last_kl": self.last_kl}

    def restore(self, state: Mapping[str, Json]) -> None:
        self.coef = number(state, "penalty_coef")
        self.last_kl = None if state.get("penalty_last_kl") is None else number(state, "penalty_last_kl")
