"""Reward functions, services, judges and verifiers behind actors of their own, away from the driver and the models."""

from collections.abc import Sequence
from typing import cast

from rlhf.actors.calls import Call, Worker, wait_all
from rlhf.types import Prompt, Reward, Rollout


class RemoteReward:
    """A `RewardSource` that lives in an actor."""

    def __init__(self, worker: Worker, *, timeout_s: float) -> None:
        self._worker = worker
        self._timeout_s = timeout_s

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        ref = self._worker.handle.score.remote(list(prompts), list(responses), list(rollouts))
        (rewards,) = wait_all([Call(worker=self._worker, ref=ref)], phase="scoring", timeout_s=self._timeout_s)
        return cast(list[Reward], rewards)

    def close(self) -> None:
        ref = self._worker.handle.close.remote()
        wait_all([Call(worker=self._worker, ref=ref)], phase="close of rewards", timeout_s=self._timeout_s)
