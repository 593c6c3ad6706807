"""Token rewards: normalization, clipping, the KL penalty and where the score sits."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms.responses import ResponseTokens, ref_kl_metrics
from rlhf.algorithms.rewards import RewardShaper, RunningStatistics, at_end, clip, spread
from rlhf.config.algo import FixedKl, PpoSection

finite = st.floats(-1e6, 1e6, allow_nan=False)


def answer(score: float, old: list[float], ref: list[float] | None = None) -> ResponseTokens:
    return ResponseTokens(
        score=score,
        old_log_probs=np.array(old),
        values=np.zeros(len(old)),
        ref_log_probs=None if ref is None else np.array(ref),
    )


@given(st.lists(st.lists(finite, max_size=5), max_size=5))
def test_running_statistics_are_those_of_all_numbers(batches: list[list[float]]) -> None:
    statistics = RunningStatistics()
    for batch in batches:
        statistics.add(np.array(batch, dtype=np.float64))
    everything = np.array([x for batch in batches for x in batch], dtype=np.float64)
    assert statistics.count == len(everything)
    if len(everything):
        assert statistics.mean == pytest.approx(everything.mean(), rel=1e-9, abs=1e-6)
        assert statistics.deviation == pytest.approx(everything.std(), rel=1e-6, abs=1e-4)


def test_statistics_of_numbers_far_from_0() -> None:
    """The sum of squares minus the square of the sum would say 0 here, or less."""
    statistics = RunningStatistics()
    statistics.add(1e9 + np.array([0.0, 1.0, 2.0]))
    assert statistics.deviation == pytest.approx(np.sqrt(2 / 3), rel=1e-6)


@pytest.mark.parametrize("value", [0.1, 1e-30, 1e30, 0.0])
def test_equal_scores_normalize_to_exactly_0(value: float) -> None:
    statistics = RunningStatistics()
    statistics.add(np.full(7, value))
    assert statistics.deviation == 0.0
    assert (statistics.normalize(np.full(7, value)) == 0.0).all()


def test_statistics_survive_json() -> None:
    statistics, again = RunningStatistics(), RunningStatistics()
    statistics.add(np.array([0.1, 0.7, 1e-17]))
    again.restore(json.loads(json.dumps(statistics.state())))
    assert again == statistics


def test_clip() -> None:
    scores = np.array([-11.0, -10.0, 0.0, 10.5])
    assert clip(scores, 10.0).tolist() == [-10.0, -10.0, 0.0, 10.0]
    assert clip(scores, 0.0).tolist() == scores.tolist()


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_where_the_score_sits(num_tokens: int) -> None:
    assert at_end(2.0, num_tokens).tolist() == [0.0] * (num_tokens - 1) + [2.0] * (num_tokens > 0)
    assert spread(3.0, num_tokens).tolist() == [3.0 / max(num_tokens, 1)] * num_tokens


def test_golden_kl_shaping_flips_the_order() -> None:
    section = PpoSection(kl=FixedKl(coef=0.2))
    rewards, metrics = RewardShaper(section).shape(
        [answer(1.20, [-2.1], [-2.2]), answer(1.35, [-1.2], [-2.8])], kl_coef=0.2
    )
    assert [float(reward.sum()) for reward in rewards] == pytest.approx([1.18, 1.03])
    assert metrics.sums["reward/shaped"] == pytest.approx((1.18 + 1.03) / 2)


def test_the_score_sits_on_the_last_token_that_was_sampled() -> None:
    given_answer = answer(1.0, [-1.0, -2.0, -3.0], [-1.5, -2.0, -2.0])
    (reward,), _ = RewardShaper(PpoSection()).shape([given_answer], kl_coef=0.1)
    np.testing.assert_allclose(reward, [-0.05, 0.0, 1.1])


@pytest.mark.parametrize(
    ("estimator", "expected"), [("auto", 0.5), ("k1", 0.5), ("k2", 0.125), ("k3", np.exp(-0.5) - 0.5)]
)
def test_the_estimator_in_the_reward(estimator: str, expected: float) -> None:
    section = PpoSection.model_validate({"kl_estimator": estimator})
    (reward,), _ = RewardShaper(section).shape([answer(0.0, [-1.0], [-1.5])], kl_coef=1.0)
    assert reward.tolist() == pytest.approx([-expected])


def test_no_kl_in_the_reward_where_it_acts_in_the_loss_or_not_at_all() -> None:
    in_loss = PpoSection(kl_placement="loss")
    for section, one in ((in_loss, answer(1.0, [-1.0], [-9.0])), (PpoSection(), answer(1.0, [-1.0]))):
        (reward,), _ = RewardShaper(section).shape([one], kl_coef=1.0)
        assert reward.tolist() == [1.0]


def test_scores_are_normalized_over_the_run_and_then_clipped() -> None:
    shaper = RewardShaper(PpoSection(normalize_rewards=True, clip_rewards=1.0))
    shaper.shape([answer(0.0, [-1.0]), answer(2.0, [-1.0])], kl_coef=0.0)
    rewards, metrics = shaper.shape([answer(4.0, [-1.0]), answer(2.0, [-1.0]), answer(999.0, [])], kl_coef=0.0)
    # 0 2 4 2 seen: mean 2, deviation sqrt 2; (4 - 2) / sqrt 2 is clipped to 1. The empty answer is not seen.
    assert [reward.tolist() for reward in rewards] == [[1.0], [0.0], []]
    assert metrics.sums["reward/clipped"] == 0.5
    assert metrics.sums["reward/running_mean"] == 2.0
    assert metrics.sums["reward/running_std"] == pytest.approx(np.sqrt(2.0))


@pytest.mark.parametrize(("truncated", "mean"), [("learn", -3.0), ("mask", 2.0), ("bootstrap", 2.0)])
def test_scores_that_nothing_learns_from_do_not_normalize_others(truncated: str, mean: float) -> None:
    shaper = RewardShaper(PpoSection.model_validate({"normalize_rewards": True, "truncated": truncated}))
    cut = replace(answer(-13.0, [-1.0]), truncated=True)
    _, metrics = shaper.shape([answer(1.0, [-1.0]), answer(3.0, [-1.0]), cut], kl_coef=0.0)
    assert metrics.sums["reward/running_mean"] == mean


def test_spread_scores_sum_to_the_score() -> None:
    (reward,), _ = RewardShaper(PpoSection(reward_at_end=False)).shape([answer(1.0, [-1.0] * 4)], kl_coef=0.0)
    assert reward.tolist() == [0.25] * 4


def test_the_kl_is_over_responses_with_tokens() -> None:
    metrics = ref_kl_metrics(
        [
            answer(1.0, [-1.0, -1.0, -1.0], [-2.0, -1.0, -1.0]),
            answer(0.0, [-1.0], [-1.0]),
            answer(-99.0, [], []),
        ]
    )
    assert metrics.sums == {
        "kl/ref_per_response": 0.5,
        "kl/ref_per_token": 0.25,
    }
    assert all(np.isfinite(list(ref_kl_metrics([]).sums.values())))
