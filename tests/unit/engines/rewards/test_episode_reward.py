"""Rewards of environments, and responses whose environment failed."""

import pickle
from collections.abc import Sequence

import pytest

from rlhf.config.reward import EnvironmentSource, NumberSource
from rlhf.engines.rewards import build_reward
from rlhf.episode import Ending, Episode, EpisodeRollout
from rlhf.errors import RewardError
from rlhf.types import Message, Prompt, Reward, Rollout
from tests.unit.engines.rewards.reward_support import prompts, responses, rollouts


def episodes(rewards: Sequence[float], *, failed: Sequence[int] = ()) -> list[Rollout]:
    """Responses of episodes that gave these rewards."""
    return [
        EpisodeRollout.of(
            rollout,
            Episode(
                messages=(Message(role="assistant", content="4"),),
                ending=Ending.FAILED if index in failed else Ending.ANSWER,
                num_turns=1,
                turn_ends=(0,),
                turn_rewards=(reward,),
                parts={"distance": 2.0},
            ),
        )
        for index, (rollout, reward) in enumerate(zip(rollouts(len(rewards)), rewards, strict=True))
    ]


def test_rewards_stand_beside_those_of_other_sources() -> None:
    reward = build_reward([EnvironmentSource(weight=2.0), NumberSource()], {})
    scored = reward.score(prompts(2), ["0", "7"], episodes([0.5, -1.0]))
    assert [one.total for one in scored] == [2.0, -2.0]
    assert scored[0].parts == {"environment": 0.5, "number": 1.0, "environment/distance": 2.0}
    assert [one.turns for one in scored] == [((0, 1.0),), ((0, -2.0),)], "by its weight; the number is of no turn"


def test_they_reach_sources_in_other_processes() -> None:
    (rollout,) = episodes([0.5])
    again = pickle.loads(pickle.dumps(rollout))
    assert isinstance(again, EpisodeRollout)
    assert again.episode == rollout.episode  # type: ignore[attr-defined]


def test_no_source_is_asked_about_a_response_whose_environment_failed() -> None:
    class Counting:
        def __init__(self) -> None:
            self.seen: list[str] = []

        def score(
            self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]
        ) -> list[Reward]:
            self.seen += [rollout.id for rollout in rollouts]
            return [Reward(total=1.0) for _ in rollouts]

        def close(self) -> None: ...

    counting = Counting()
    reward = build_reward([EnvironmentSource(name="count")], {"count": counting})
    scored = reward.score(prompts(3), responses(3), episodes([0.0, 1.0, 0.0], failed=[0, 2]))
    assert [one.is_scored for one in scored] == [False, True, False]
    assert counting.seen == ["r1"]
    assert not reward.score(prompts(1), responses(1), episodes([0.0], failed=[0]))[0].is_scored


def test_no_reward_is_made_up() -> None:
    reward = build_reward([EnvironmentSource()], {})
    with pytest.raises(RewardError, match="r0 is a response without an environment"):
        reward.score(prompts(1), responses(1), rollouts(1))
