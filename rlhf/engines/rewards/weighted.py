"""Several named reward sources as one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf.engines.base import RewardSource
from rlhf.errors import RewardError
from rlhf.types import Prompt, Reward, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """A source and its factor in the total reward."""

    source: RewardSource
    weight: float


class WeightedRewards:
    """The weighted sum of named sources. Each reward's `parts` are the unweighted scores of the sources."""

    def __init__(self, sources: Mapping[str, Weighted]) -> None:
        self._sources = dict(sources)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        columns = {name: one.source.score(prompts, responses, rollouts) for name, one in self._sources.items()}
        rewards = []
        for index, prompt in enumerate(prompts):
            parts = {name: rewards[index].total for name, rewards in columns.items()}
            total = math.fsum(self._sources[name].weight * score for name, score in parts.items())
            if not math.isfinite(total):
                raise RewardError(f"reward: the sum for {prompt.id} is not finite ({parts}).")
            rewards.append(Reward(total=total, parts=parts))
        return rewards

    def close(self) -> None:
        for one in self._sources.values():
            one.source.close()
