"""GAE against its definition, whitening and explained variance against their own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms.advantages import (
    GAE_RESPONSES,
    Floats,
    explained_variance,
    gae,
    gae_of_all,
    whiten,
    whole_response,
)

numbers = st.floats(-100.0, 100.0, allow_nan=False, width=32)
unit = st.floats(0.0, 1.0)


def gae_by_definition(rewards: Floats, values: Floats, gamma: float, gae_lambda: float) -> Floats:
    """O(n^2): A_t = sum_l (gamma * lambda)^l * delta_{t+l}."""
    n = len(rewards)
    ema_reference = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * ema_reference[t] - values[t] for t in range(n)]
    return np.array([sum((gamma * gae_lambda) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)])


@given(st.lists(st.tuples(numbers, numbers), max_size=40), unit, unit)
def test_gae_is_its_definition(steps: list[tuple[float, float]], gamma: float, gae_lambda: float) -> None:
    rewards = np.array([reward for reward, _ in steps], dtype=np.float64)
    values = np.array([value for _, value in steps], dtype=np.float64)
    advantages, returns = gae(rewards, values, gamma=gamma, gae_lambda=gae_lambda)
    np.testing.assert_allclose(advantages, gae_by_definition(rewards, values, gamma, gae_lambda), rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(returns, advantages + values)
    assert advantages.shape == returns.shape == rewards.shape


def test_gae_of_many_responses_is_the_recursion_in_each() -> None:
    """Bit for bit, as Python's own numbers give it, over more responses than are computed together."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(0, 9, size=GAE_RESPONSES + 3)
    rewards, values = ([draw.normal(size=n) for n in lengths] for _ in range(2))
    ends = draw.normal(size=len(lengths)).tolist()
    found = gae_of_all(rewards, values, ends, gamma=0.97, gae_lambda=0.9)
    for reward, value, end, (advantages, returns) in zip(rewards, values, ends, found, strict=True):
        expected, later, next_value = [], 0.0, end
        for r, v in zip(reward.tolist()[::-1], value.tolist()[::-1], strict=True):
            later = r + 0.97 * next_value - v + 0.97 * 0.9 * later
            next_value = v
            expected.append(later)
        assert advantages.tolist() == expected[::-1]
        assert returns.tolist() == [a + v for a, v in zip(advantages.tolist(), value.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("gamma", "gae_lambda", "advantages"),
    [
        # rewards 0 0 1, values .5 .6 .7, by hand. deltas at gamma 1: .1 .1 .3; at gamma .5: -.2 -.25 .3
        (1.0, 1.0, [0.5, 0.4, 0.3]),
        (1.0, 0.0, [0.1, 0.1, 0.3]),
        (1.0, 0.5, [0.225, 0.25, 0.3]),
        (0.5, 1.0, [-0.25, -0.10, 0.3]),
    ],
)
def test_gae_by_hand(gamma: float, gae_lambda: float, advantages: list[float]) -> None:
    got, returns = gae(np.array([0, 0, 1.0]), np.array([0.5, 0.6, 0.7]), gamma=gamma, gae_lambda=gae_lambda)
    np.testing.assert_allclose(got, advantages, atol=1e-12)
    np.testing.assert_allclose(returns, np.add(advantages, [0.5, 0.6, 0.7]))


def test_lambda_1_telescopes_to_the_return_minus_the_value() -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=9), rng.normal(size=9)
    _, returns = gae(rewards, values, gamma=1.0, gae_lambda=1.0)
    np.testing.assert_allclose(returns, rewards[::-1].cumsum()[::-1])


def test_whole_answer_is_one_action() -> None:
    advantage, returns = whole_response(np.array([-0.1, 0.2, 1.0]), np.array([0.4, 9.0, -9.0]))
    np.testing.assert_allclose(advantage, [0.7])
    np.testing.assert_allclose(returns, [1.1])
    empty, _ = whole_response(np.zeros(0), np.zeros(0))
    assert empty.shape == (0,)


@given(st.lists(st.lists(numbers, max_size=6), max_size=6))
def test_whitening_is_over_all_answers_together(rows: list[list[float]]) -> None:
    arrays = [np.array(row, dtype=np.float64) for row in rows]
    whitened = whiten(arrays)
    assert [len(one) for one in whitened] == [len(one) for one in arrays]
    joined, before = np.concatenate([*whitened, []]), np.concatenate([*arrays, []])
    assert np.isfinite(joined).all()
    if len(before) and before.std() > 1e-3:
        assert joined.mean() == pytest.approx(0.0, abs=1e-6)
        assert joined.std() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("value", [0.1, 1e-30, 1e30, -7.3, 0.0])
def test_equal_advantages_whiten_to_exactly_0(value: float) -> None:
    """0.1 seven times has a rounded mean that is not 0.1: an epsilon beside the deviation would not save this."""
    for one in whiten([np.full(3, value), np.full(4, value)]):
        assert (one == 0.0).all()


def test_whitening_by_hand() -> None:
    first, second = whiten([np.array([1.0, 3.0]), np.array([5.0, 7.0])])
    np.testing.assert_allclose(np.concatenate([first, second]), np.array([-3, -1, 1, 3]) / np.sqrt(5), rtol=1e-7)


def test_explained_variance() -> None:
    returns = np.array([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(np.zeros(4), returns) == 1.0
    assert explained_variance(returns - returns.mean(), returns) == pytest.approx(0.0)
    assert explained_variance(2 * returns, returns) == pytest.approx(-3.0)
    assert explained_variance(np.array([1.0, 2.0]), np.array([5.0, 5.0])) == 0.0
    assert explained_variance(np.zeros(0), np.zeros(0)) == 0.0
