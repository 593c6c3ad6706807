"""Losses against golden numbers, and what masks and weights promise."""

import math

import pytest
import torch

from rlhf.algorithms.base import Outputs
from rlhf.algorithms.losses import (
    bradley_terry,
    constant_length,
    entropy_of,
    masked,
    ppo_clip,
    ppo_penalty,
    present,
    sequence_mean,
    sequence_sum,
    to_metrics,
    token_mean,
    token_weights,
    value_loss,
)
from rlhf.types import Denominators, Signal
from tests.unit.algorithms.build import tensor_batch


@pytest.mark.parametrize(
    ("better", "worse", "margin", "loss"),
    [(2.0, 0.5, 0.0, 0.2014), (0.5, 2.0, 0.0, 1.7014), (0.0, 0.0, 0.0, math.log(2)), (2.0, 0.5, 1.5, math.log(2))],
)
def test_golden_bradley_terry(better: float, worse: float, margin: float, loss: float) -> None:
    got = bradley_terry(torch.tensor(better), torch.tensor(worse), torch.tensor(margin))
    assert got.item() == pytest.approx(loss, abs=5e-5)


def test_golden_bradley_terry_probability() -> None:
    loss = bradley_terry(torch.tensor(2.0), torch.tensor(0.5), torch.tensor(0.0))
    assert math.exp(-loss.item()) == pytest.approx(0.8176, abs=5e-5)


@pytest.mark.parametrize("gap", [-1e4, -100.0, 100.0, 1e4])
def test_bradley_terry_is_finite(gap: float) -> None:
    scores = torch.tensor([gap], requires_grad=True)
    loss = bradley_terry(scores, torch.zeros(1), torch.zeros(1)).sum()
    loss.backward()
    assert loss.isfinite()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize(("ratio", "clipped"), [(1.2, 1.2), (1.4, 1.2), (0.7, 0.8), (1.0, 1.0)])
def test_golden_clip(ratio: float, clipped: float) -> None:
    """The clipped arm alone: with A > 0 it acts above, with A < 0 below."""
    advantage = 1.0 if ratio >= 1.0 else -1.0
    loss = ppo_clip(torch.tensor(ratio).log(), torch.tensor(advantage), 0.2, 0.2)
    assert loss.item() == pytest.approx(-advantage * clipped, rel=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "has_gradient"),
    [
        (0.5, -1.0, 0.8, False),
        (1.5, -1.0, 1.5, True),  # a bad action with a large ratio keeps its gradient
        (1.5, 1.0, -1.2, False),
        (0.5, 1.0, -0.5, True),
        (1.1, 2.0, -2.2, True),
        (1.1, -2.0, 2.2, True),
    ],
)
def test_golden_ppo_objective(ratio: float, advantage: float, loss: float, has_gradient: bool) -> None:
    log_ratio = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
    got = ppo_clip(log_ratio, torch.tensor(advantage, dtype=torch.float64), 0.2, 0.2)
    got.backward()
    assert got.item() == pytest.approx(loss)
    assert log_ratio.grad is not None
    assert log_ratio.grad.item() == pytest.approx(-ratio * advantage if has_gradient else 0.0)


def test_each_side_clips_by_its_own_bound() -> None:
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5])
    got = ppo_clip(ratio.log(), torch.tensor([-1.0, 1.0, 1.0, -1.0]), 0.1, 0.3)
    assert got.tolist() == pytest.approx([0.9, -0.5, -1.3, 1.5])


@pytest.mark.parametrize("log_ratio", [-100.0, 0.0, 100.0])
@pytest.mark.parametrize("advantage", [-3.0, 3.0])
def test_surrogates_are_finite(log_ratio: float, advantage: float) -> None:
    x, a = torch.tensor([log_ratio]), torch.tensor([advantage])
    assert ppo_clip(x, a, 0.2, 0.2).isfinite().all()
    assert ppo_penalty(x, a, 1.0).isfinite().all()


def test_penalty_by_hand() -> None:
    """ratio 1.5, A 2, beta 0.5: -(3 - 0.5 * (1.5 - 1 - ln 1.5)); at ratio 1 the KL is 0."""
    got = ppo_penalty(torch.tensor([1.5, 1.0]).log(), torch.tensor([2.0, 2.0]), 0.5)
    assert got.tolist() == pytest.approx([-3.0 + 0.5 * (0.5 - math.log(1.5)), -2.0])


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss"),
    [
        (1.0, 1.0, 3.0, 0.5, 2.0),  # did not move: (1 - 3)^2 / 2
        (2.0, 1.0, 3.0, 0.5, 1.125),  # moved by 1: only 1.5 counts, (1.5 - 3)^2 / 2
        (2.0, 1.0, 3.0, 0.0, 0.5),  # not clipped
        (4.0, 1.0, 2.0, 0.5, 2.0),  # moved past the target: the larger of (4 - 2)^2 and (1.5 - 2)^2
    ],
)
def test_value_loss_by_hand(value: float, old: float, target: float, clip: float, loss: float) -> None:
    got = value_loss(torch.tensor(value), torch.tensor(old), torch.tensor(target), clip)
    assert got.item() == pytest.approx(loss)


MASK = [False, True, True, True, False, True, False, False]
LENGTHS = [4, 2, 2, 0]
"""Three, one, none and no tokens at all."""


def test_weights_by_hand() -> None:
    batch = tensor_batch(MASK, LENGTHS)
    quarter, sixth, half = 1 / 4, 1 / 6, 1 / 2
    assert token_mean(batch).tolist() == pytest.approx([0, quarter, quarter, quarter, 0, quarter, 0, 0])
    assert sequence_mean(batch).tolist() == pytest.approx([0, sixth, sixth, sixth, 0, half, 0, 0])
    assert constant_length(batch, 10.0).tolist() == pytest.approx([0, 0.05, 0.05, 0.05, 0, 0.05, 0, 0])


def test_weights_use_the_steps_denominators() -> None:
    step = Denominators(tokens=40.0, sequences=20.0, examples=20.0)
    batch = tensor_batch(MASK, LENGTHS, denominators=step)
    assert token_mean(batch).sum().item() == pytest.approx(4 / 40)
    assert sequence_mean(batch).sum().item() == pytest.approx(2 / 20)
    assert token_weights("seq-mean-token-sum-norm", 8.0)(batch).sum().item() == pytest.approx(4 / 8 / 20)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_weights_of_nothing_are_0(aggregation: str) -> None:
    batch = tensor_batch([False, False, False], [2, 1, 0])
    assert token_weights(aggregation, 4.0)(batch).tolist() == [0.0, 0.0, 0.0]


def test_masked_keeps_poison_out_of_value_and_gradient() -> None:
    x = torch.tensor([1.0, math.nan, math.inf, -math.inf, 2.0], requires_grad=True)
    mask = torch.tensor([True, False, False, False, True])
    total = (masked(x, mask).exp().square() * 3.0).sum()
    total.backward()
    assert total.isfinite()
    assert x.grad is not None
    assert x.grad[~mask].tolist() == [0.0, 0.0, 0.0]
    assert x.grad.isfinite().all()


def test_masked_computes_in_float32_or_better() -> None:
    mask = torch.ones(1, dtype=torch.bool)
    assert masked(torch.zeros(1, dtype=torch.bfloat16), mask).dtype == torch.float32
    assert masked(torch.zeros(1, dtype=torch.float64), mask).dtype == torch.float64


def test_sequence_sum() -> None:
    got = sequence_sum(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([2, 0, 3]))
    assert got.tolist() == [3.0, 3.0, 12.0, 12.0, 12.0]


def test_a_missing_signal_is_named() -> None:
    batch = tensor_batch([True], [1], old_log_probs=torch.zeros(1))
    with pytest.raises(ValueError, match=r"needs advantages, .* \(it holds sampler_log_probs, old_log_probs\)"):
        present(batch, Signal.ADVANTAGES)
    with pytest.raises(ValueError, match="needs the entropy"):
        entropy_of(Outputs(predictions=torch.zeros(1)), batch)


def test_measure() -> None:
    got = to_metrics({"a": torch.tensor(1.0, requires_grad=True), "b": torch.tensor(True)}, {"c": torch.tensor(3)})
    assert got.sums == {"a": 1.0, "b": 1.0}
    assert got.maxima == {"c": 3.0}
