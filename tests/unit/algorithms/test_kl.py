"""KL estimators against the exact divergence of small categoricals; controllers against tables."""

import json
import math

import pytest
import torch

from rlhf.algorithms.kl import (
    AdaptiveKlController,
    Estimator,
    FixedKlController,
    PenaltyController,
    clamped_exp,
    kl_controller,
    kl_estimate,
    kl_loss,
    kl_to_old,
)
from rlhf.config.algo import AdaptiveKl, FixedKl
from rlhf.errors import CheckpointError

ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3")
LOGITS = torch.tensor([0.3, -1.2, 0.8, 0.1, -0.4], dtype=torch.float64)
OLD = torch.tensor([0.1, -0.9, 0.5, 0.6, -0.4], dtype=torch.float64).log_softmax(0)
REF = torch.tensor([-0.7, 0.2, 0.9, -0.3, 1.1], dtype=torch.float64).log_softmax(0)


def gradient(of: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    (grad,) = torch.autograd.grad(of, logits)
    return grad


def exact_gradient(reverse: bool = False) -> torch.Tensor:
    """Of KL(policy || REF), or of KL(REF || policy), by the logits."""
    logits = LOGITS.clone().requires_grad_()
    log_probs = logits.log_softmax(0)
    p, q = (REF, log_probs) if reverse else (log_probs, REF)
    return gradient((p.exp() * (p - q)).sum(), logits)


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) - 0.5)])
def test_estimates_by_hand(estimator: Estimator, expected: float) -> None:
    got = kl_estimate(estimator, torch.tensor([-1.0]), torch.tensor([-1.5]))
    assert got.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator: Estimator) -> None:
    log_probs = LOGITS.log_softmax(0)
    exact = (log_probs.exp() * (log_probs - REF)).sum()
    torch.testing.assert_close((log_probs.exp() * kl_estimate(estimator, log_probs, REF)).sum(), exact)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("d", [-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4])
def test_finite_with_a_finite_gradient(estimator: Estimator, d: float) -> None:
    log_probs = torch.tensor([d], requires_grad=True)
    estimate = kl_estimate(estimator, log_probs, torch.zeros(1))
    assert estimate.isfinite().all()
    assert gradient(estimate.sum(), log_probs).isfinite().all()
    assert clamped_exp(log_probs).isfinite().all()
    if estimator != "k1":
        assert estimate.item() >= 0.0
        loss = kl_loss("k2" if estimator == "k2" else "k3", log_probs, torch.zeros(1), torch.zeros(1))
        assert loss.isfinite().all()
        assert gradient(loss.sum(), log_probs).isfinite().all()


def test_k3_does_not_cancel_near_0() -> None:
    """exp(-d) - 1 + d in float32 says 0 or 6e-8 here."""
    got = kl_estimate("k3", torch.tensor([1e-4]), torch.zeros(1))
    assert got.item() == pytest.approx(5e-9, rel=1e-2)


def test_estimators_alone_have_other_gradients() -> None:
    """Why `kl_loss` exists: over the policy's own samples k1's gradient vanishes and k3's is the reverse KL's."""

    def expected_gradient(estimator: Estimator) -> torch.Tensor:
        logits = LOGITS.clone().requires_grad_()
        log_probs = logits.log_softmax(0)
        return gradient((log_probs.exp().detach() * kl_estimate(estimator, log_probs, REF)).sum(), logits)

    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(5, dtype=torch.float64))
    torch.testing.assert_close(expected_gradient("k2"), exact_gradient())
    torch.testing.assert_close(expected_gradient("k3"), exact_gradient(reverse=True))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("old", [LOGITS.log_softmax(0), OLD], ids=["on-policy", "off-policy"])
def test_the_loss_has_the_exact_gradient(estimator: str, old: torch.Tensor) -> None:
    logits = LOGITS.clone().requires_grad_()
    log_probs = logits.log_softmax(0)
    loss = kl_loss("k2" if estimator == "k2" else "k3", log_probs, old, REF)
    torch.testing.assert_close(gradient((old.exp() * loss).sum(), logits), exact_gradient())


def test_kl_to_old_has_value_and_gradient_of_the_exact_one() -> None:
    logits = LOGITS.clone().requires_grad_()
    log_probs = logits.log_softmax(0)
    exact = (OLD.exp() * (OLD - log_probs)).sum()
    estimate = (OLD.exp() * kl_to_old(log_probs - OLD)).sum()
    torch.testing.assert_close(estimate, exact)
    other = LOGITS.clone().requires_grad_()
    torch.testing.assert_close(
        gradient(estimate, logits), gradient((OLD.exp() * (OLD - other.log_softmax(0))).sum(), other)
    )
    assert kl_to_old(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("kl", "num_responses", "expected"),
    [
        (6.0, 100, 0.10),  # on target
        (6.6, 100, 0.1 * (1 + 0.1 * 0.01)),  # 10 % above
        (60.0, 100, 0.1 * (1 + 0.2 * 0.01)),  # far above: the error is cut at a fifth
        (0.0, 100, 0.1 * (1 - 0.2 * 0.01)),
        (-1.0, 100, 0.1 * (1 - 0.2 * 0.01)),  # an estimate may be negative
        (60.0, 10_000, 0.1 * 1.2),
        (0.0, 10_000_000, 0.1 * 0.8),  # a batch above the horizon cannot turn the sign
    ],
)
def test_adaptive_controller(kl: float, num_responses: int, expected: float) -> None:
    controller = AdaptiveKlController(coef=0.1, target=6.0, horizon=10_000)
    controller.update(kl, num_responses)
    assert controller.coef == pytest.approx(expected, rel=1e-12)


def test_fixed_controller_stays() -> None:
    controller = kl_controller(FixedKl(coef=0.3))
    controller.update(100.0, 10_000)
    assert isinstance(controller, FixedKlController)
    assert controller.coef == 0.3
    assert controller.state() == {}


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(0.0066, 0.5), (0.0067, 1.0), (0.01, 1.0), (0.015, 1.0), (0.0151, 2.0), (5.0, 2.0), (0.0, 0.5)],
)
def test_penalty_controller(kl: float, expected: float) -> None:
    """Target 0.01: halves below 0.00667, doubles above 0.015, once an update, by the last pass."""
    controller = PenaltyController(coef=1.0, target=0.01)
    assert controller.start_update() == 1.0
    controller.observe(99.0)
    controller.observe(kl)
    assert controller.start_update() == expected
    assert controller.start_update() == expected


def test_penalty_stays_within_reach() -> None:
    controller = PenaltyController(coef=1.0, target=0.01)
    for _ in range(200):
        controller.observe(0.0)
        controller.start_update()
    assert controller.coef == 1e-6
    for _ in range(200):
        controller.observe(1.0)
        controller.start_update()
    assert controller.coef == 1e6


def test_states_survive_json() -> None:
    adaptive = kl_controller(AdaptiveKl(coef=0.1))
    adaptive.update(7.0, 123)
    again = kl_controller(AdaptiveKl(coef=0.5))
    again.restore(json.loads(json.dumps(adaptive.state())))
    assert again.coef == adaptive.coef
    for last_kl in (None, 0.1):
        penalty = PenaltyController(coef=0.3, target=0.01, last_kl=last_kl)
        other = PenaltyController(coef=1.0, target=0.01, last_kl=9.0)
        other.restore(json.loads(json.dumps(penalty.state())))
        assert other == penalty


def test_a_checkpoint_of_a_fixed_coefficient_leaves_that_of_the_config() -> None:
    adaptive = kl_controller(AdaptiveKl(coef=0.01, target=6.0, horizon=100))
    adaptive.restore(kl_controller(FixedKl(coef=0.5)).state())
    assert adaptive.coef == 0.01


@pytest.mark.parametrize("value", ["0.1", None, True, [0.1]])
def test_a_damaged_state_is_named(value: object) -> None:
    with pytest.raises(CheckpointError, match="kl_coef: not a number"):
        kl_controller(AdaptiveKl()).restore({"kl_coef": value})  # type: ignore[dict-item]
