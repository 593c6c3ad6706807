"""The probe after a weight sync: does an engine compute with the weights that arrived, and does the policy itself?

Equal digests show that the bytes arrived; only log-probs show what is computed with them. Two sides that disagree do
not say which is wrong, so the policy is compared with itself first: as a run computes (packed, with its kernels)
against each sequence alone with eager attention.
"""

from dataclasses import dataclass

import numpy as np

from rlhf.errors import NumericsError
from rlhf.types import FloatArray

LEAST_TOLERANCE = 1e-3
"""Nats a token that kernels of two libraries may always differ by."""
NOISE_FACTOR = 8.0
"""How many times the policy's rounding noise they may differ by; stale weights differ by far more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyProbe:
    """The policy's log-probs [T] of the tokens that an engine sampled, in nats."""

    log_probs: FloatArray
    """As a run computes them."""
    alone: FloatArray
    """Of each sequence alone, with eager attention."""
    tolerance: float
    """How far two right ways to compute may differ."""


def probe_tolerance(noise: float, temperature: float) -> float:
    """From the rounding noise of the policy's log-probs at temperature 1 (`SelfTest.noise`). A temperature below 1
    enlarges differences of logits."""
    return max(LEAST_TOLERANCE, NOISE_FACTOR * noise) * max(1.0, 1.0 / temperature)


def require_agreement(engine: str, version: int, by_engine: FloatArray, by_policy: PolicyProbe) -> None:
    """Compare an engine's log-probs [T] with the policy's, after the sync of `version`.

    Raises:
        NumericsError: they differ by more than rounding, or are not finite. Names the side that is wrong.
    """
    own, tolerance = _gap(by_policy.log_probs, by_policy.alone), by_policy.tolerance
    if not own <= tolerance:  # also for NaN
        raise NumericsError(
            f"policy: version {version}: its log-probs of packed sequences differ from those of each sequence alone, "
            f"with eager attention, by {own:.3g} nats (at most {tolerance:.3g}): the trainer computes wrong. Set "
            "policy.attention eager, and report it with the model's name"
        )
    gap = _gap(by_engine, by_policy.log_probs)
    if not gap <= tolerance:
        raise NumericsError(
            f"{engine}: version {version}: its log-probs of its own samples differ from the policy's by {gap:.3g} nats "
            f"(at most {tolerance:.3g}), and the policy agrees with itself to {own:.2g}: the weights arrived, but this "
            "engine computes something else with them. Try another rollout.engine, or report it with the model's name"
        )


def _gap(one: FloatArray, other: FloatArray) -> float:
    """The largest difference; NaN if a number is."""
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0.0))
