"""What environments gave in their episodes, as a reward source."""

from collections.abc import Sequence

from rlhf.episode import Ending, EpisodeRollout
from rlhf.errors import RewardError
from rlhf.types import Prompt, Reward, Rollout


class EpisodeReward:
    """The rewards of tools and environments: what they gave in all turns together. Raises RewardError for a response
    that had neither."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        return [_reward(rollout) for rollout in rollouts]

    def close(self) -> None:
        """Nothing to close."""


def has_failed(rollout: Rollout) -> bool:
    """Whether a response was given up because its environment failed."""
    return isinstance(rollout, EpisodeRollout) and rollout.episode.ending is Ending.FAILED


def _reward(rollout: Rollout) -> Reward:
    if not isinstance(rollout, EpisodeRollout):
        raise RewardError(f"reward environment: {rollout.id} is a response without an environment.")
    episode = rollout.episode
    turns = tuple(zip(episode.turn_ends, episode.turn_rewards, strict=False))  # none of an episode without a turn
    return Reward(total=episode.reward, parts=episode.parts, turns=turns)
