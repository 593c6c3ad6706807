"""Several named reward sources as one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf.engines.base import RewardSource
from rlhf.engines.rewards.episode_reward import has_failed
from rlhf.errors import RewardError
from rlhf.types import UNSCORED, Prompt, Reward, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """A source and its factor in the total reward."""

    source: RewardSource
    weight: float


class WeightedRewards:
    """The weighted sum of named sources. A response that one source does not score has no total.

    Each reward's `parts` are the unweighted scores of the sources, and what a source reports itself, as `SOURCE/PART`.
    Of two sources that log the same name, the later one's value counts. No source is asked about a response whose
    environment failed, which has no total.
    """

    def __init__(self, sources: Mapping[str, Weighted]) -> None:
        self._sources = dict(sources)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        whole = [index for index, rollout in enumerate(rollouts) if not has_failed(rollout)]
        scored = iter(
            self._score([prompts[i] for i in whole], [responses[i] for i in whole], [rollouts[i] for i in whole])
        )
        return [Reward(total=UNSCORED) if has_failed(rollout) else next(scored) for rollout in rollouts]

    def _score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        if not prompts:
            return []
        columns = {name: one.source.score(prompts, responses, rollouts) for name, one in self._sources.items()}
        rewards = []
        for index, prompt in enumerate(prompts):
            own = {name: rewards[index] for name, rewards in columns.items()}
            parts = {name: reward.total for name, reward in own.items() if reward.is_scored}
            total = math.fsum(self._sources[name].weight * score for name, score in parts.items())
            if not math.isfinite(total):
                raise RewardError(f"reward: the sum for {prompt.id} is not finite ({parts}).")
            reported = {f"{name}/{part}": value for name, one in own.items() for part, value in one.parts.items()}
            logged = {name: value for one in own.values() for name, value in one.logged.items()}
            turns = tuple((end, self._sources[name].weight * r) for name, one in own.items() for end, r in one.turns)
            whole = total if len(parts) == len(own) else UNSCORED
            rewards.append(Reward(total=whole, parts=parts | reported, logged=logged, turns=turns))
        return rewards

    def close(self) -> None:
        for one in self._sources.values():
            one.source.close()
