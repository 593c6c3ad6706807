"""Truncated responses are masked, penalized or bootstrapped; a greedy baseline is penalized as any other response."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from rlhf.algorithms import build_algorithm
from rlhf.algorithms.advantages import gae
from rlhf.config.algo import (
    CriticFreeSection,
    DapoSection,
    FixedKl,
    GrpoSection,
    NoCorrection,
    PpoSection,
    ReinforceSection,
    RemaxSection,
)
from rlhf.types import Experience, FinishReason, GreedyResponse, Reward, Rollout, ScoredGroup, Signal
from tests.unit.algorithms.build import group, rollout, signals

FREE = FixedKl(coef=0.0)
PLAIN = {"kl": FREE, "correction": NoCorrection()}
PPO_PLAIN = PpoSection(kl=FREE, correction=NoCorrection(), whiten_advantages=False, gamma=0.9, gae_lambda=0.8)


def cut(num_tokens: int, name: str) -> Rollout:
    return rollout([5] * num_tokens, name=name, finish_reason=FinishReason.LENGTH)


def credited(
    section: CriticFreeSection | PpoSection, one_group: ScoredGroup, values: Sequence[float] = ()
) -> list[Experience]:
    algorithm = build_algorithm(section)
    examples = algorithm.select([one_group])
    sizes = [int(example.sequences[0].loss_mask.sum()) for example in examples]
    given = [
        signals(example, old=[-1.0] * size, values=values or [0.0] * size)
        for example, size in zip(examples, sizes, strict=True)
    ]
    return algorithm.credit(examples, given)[0]


def learned(experience: Experience, signal: Signal = Signal.ADVANTAGES) -> list[float]:
    (sequence,) = experience.sequences
    numbers: list[float] = sequence.signals[signal][sequence.loss_mask].tolist()
    return numbers


@pytest.mark.parametrize("section", [GrpoSection, DapoSection, ReinforceSection])
def test_a_masked_response_stays_in_the_baseline(section: type[CriticFreeSection]) -> None:
    whole = group([rollout([5, 5], name="a"), rollout([5, 5, 5], name="b")], [1.0, 0.0])
    half = group([rollout([5, 5], name="a"), cut(3, "b")], [1.0, 0.0])
    settings = {**PLAIN, "scale": "none", "overlong_buffer": 0}
    expected = credited(section(**settings), whole)
    masked = credited(section(**settings, truncated="mask"), half)
    assert learned(masked[0]) == learned(expected[0])
    assert learned(masked[1]) == []
    assert credited(section(**settings), half)[1].sequences[0].loss_mask.sum() == 3


def test_masked_tokens_are_in_no_batch_statistic() -> None:
    kept = [rollout([5], name="a"), rollout([5], name="b")]
    section = ReinforceSection(**PLAIN, truncated="mask")
    alone = credited(section, group(kept, [1.0, 0.0]))
    beside = credited(section, group([*kept, cut(4, "c")], [1.0, 0.0, -50.0]))
    assert [learned(one) for one in beside] == [*[learned(one) for one in alone], []]


def test_the_penalty_is_part_of_the_score() -> None:
    both = group([rollout([5], name="a"), cut(1, "b")], [1.0, 1.0])
    penalized = credited(GrpoSection(**PLAIN, scale="none", truncated_penalty=0.5), both)
    assert [learned(one) for one in penalized] == [[0.25], [-0.25]]
    section = PPO_PLAIN.model_copy(update={"truncated_penalty": 0.5})
    (last,) = credited(section, group([cut(1, "a")], [1.0]), [0.25])
    assert learned(last) == [0.25]


def test_a_bootstrapped_response_goes_on_in_the_critic() -> None:
    """r_t = 0, and the last token's value stands for everything after it: the score is not used."""
    values = [0.5, -0.25, 0.75]
    section = PPO_PLAIN.model_copy(update={"truncated": "bootstrap"})
    for score in (1.0, -7.0):
        (experience,) = credited(section, group([cut(3, "a")], [score]), values)
        delta_1, delta_2 = 0.9 * -0.25 - 0.5, 0.9 * 0.75 + 0.25
        assert learned(experience) == pytest.approx([delta_1 + 0.9 * 0.8 * delta_2, delta_2], rel=1e-6)
        assert learned(experience, Signal.RETURNS) == pytest.approx(
            [0.5 + delta_1 + 0.9 * 0.8 * delta_2, -0.25 + delta_2], rel=1e-6
        )
    (ended,) = credited(section, group([rollout([5] * 3, name="a")], [1.0]), values)
    (plain,) = credited(PPO_PLAIN, group([rollout([5] * 3, name="a")], [1.0]), values)
    assert learned(ended) == learned(plain)
    assert len(learned(ended)) == 3


def test_a_bootstrapped_prefix_of_a_response_has_its_advantages() -> None:
    """With the true value after a prefix, and lambda 1, the prefix has the advantages of the whole response."""
    rewards, values = np.array([0.0, 0.0, 0.0, 2.0]), np.array([0.3, 0.1, 0.9 * 2.0, 2.0])
    whole, _ = gae(rewards, values, gamma=0.9, gae_lambda=1.0)
    prefix, _ = gae(rewards[:2], values[:2], gamma=0.9, gae_lambda=1.0, end_value=float(values[2]))
    np.testing.assert_allclose(prefix, whole[:2], rtol=1e-12)


def test_a_truncated_response_of_one_token_teaches_nothing() -> None:
    section = PPO_PLAIN.model_copy(update={"truncated": "bootstrap"})
    (experience,) = credited(section, group([cut(1, "a")], [1.0]), [0.5])
    assert learned(experience) == learned(experience, Signal.RETURNS) == []


def test_a_bootstrapped_score_is_in_no_statistic() -> None:
    section = PPO_PLAIN.model_copy(update={"truncated": "bootstrap", "normalize_rewards": True})
    kept = [rollout([5], name="a"), rollout([5], name="b")]
    alone = credited(section, group(kept, [1.0, 0.0]))
    beside = credited(section, group([*kept, cut(2, "c")], [1.0, 0.0, 90.0]))
    assert [learned(one) for one in beside][:2] == [learned(one) for one in alone]


@pytest.mark.parametrize("how", ["mask", "bootstrap"])
def test_a_step_of_truncated_responses_is_no_crash(how: str) -> None:
    section = PpoSection(kl=FREE, correction=NoCorrection(), truncated=how)
    experiences = credited(section, group([cut(1, "a"), cut(1, "b")], [1.0, 0.0]))
    assert [learned(one) for one in experiences] == [[], []]


def test_the_greedy_baseline_is_penalized_for_its_own_length() -> None:
    """ReMax compares a response of 9 tokens with a greedy one of 8: both are in the buffer from 6 to 10."""
    section = RemaxSection(**PLAIN, overlong_buffer=4, overlong_limit=10, truncated_penalty=3.0)
    greedy = GreedyResponse(rollout=rollout([1] * 8, name="greedy"), reward=Reward(total=0.5))
    made = replace(group([rollout([5] * 9, name="a")], [1.0]), baseline=greedy)
    assert learned(credited(section, made)[0])[-1] == pytest.approx((1.0 - 0.75) - (0.5 - 0.5))
    cut_off = replace(greedy, rollout=replace(greedy.rollout, finish_reason=FinishReason.LENGTH))
    (experience,) = credited(section, replace(made, baseline=cut_off))
    assert learned(experience)[-1] == pytest.approx((1.0 - 0.75) - (0.5 - 0.5 - 3.0))
