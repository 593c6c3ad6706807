"""Reward sources that run in workers of their own: functions, services, judges, verifiers."""

from collections.abc import Sequence
from typing import cast

from rlhf.actors.groups import WorkerGroup
from rlhf.repair import Repair, Repaired
from rlhf.types import Prompt, Reward, Rollout


class RemoteReward:
    """A `RewardSource` in the only worker of a group."""

    def __init__(self, group: WorkerGroup, *, timeout_s: float, repaired: Repaired) -> None:
        """`repaired` is told of what the source repaired, after each call."""
        self._group = group
        self._repaired = repaired
        self._timeout_s = timeout_s

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        (reply,) = self._group.run(
            lambda _rank, handle: handle.score.remote(list(prompts), list(responses), list(rollouts)),
            phase="scoring",
            timeout_s=self._timeout_s,
        )
        rewards, repairs = cast(tuple[list[Reward], list[Repair]], reply)
        for repair in repairs:
            self._repaired(repair)
        return rewards

    def close(self) -> None:
        self._group.run(
            lambda _rank, handle: handle.close.remote(), phase="close of rewards", timeout_s=self._timeout_s
        )
