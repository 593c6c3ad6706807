"""Sleep mode of rollout engines that are colocated with models (a hybrid engine): they compute alternately."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rlhf.actors.calls import Worker
from rlhf.actors.probed import ProbedPolicy
from rlhf.engines.base import RolloutEngine
from rlhf.errors import RewardError
from rlhf.types import SyncReport


class SleepMode:
    """Keeps engines awake only while somebody generates, so that models can use the memory of the shared devices.

    Waits for: the engines to wake up, and to sleep after the last of several users. Where generation fails they stay
    awake: the attempt ends. A RewardError ends an evaluation alone, so that they sleep after it too.
    """

    def __init__(self, engines: RolloutEngine) -> None:
        self._engines = engines
        self._lock = threading.Lock()
        self._num_users = 0

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The engines are awake inside."""
        with self._lock:
            if not self._num_users:
                self._engines.wake()
            self._num_users += 1
        try:
            yield
        except RewardError:
            self._leave()
            raise
        self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._num_users -= 1
            if not self._num_users:
                self._engines.sleep()


class WakeForSync(ProbedPolicy):
    """The policy of engines in sleep mode. Before a weight sync it wakes their weights alone, so that the buckets have
    the memory of the KV cache; the rest when the buckets are gone. The engines stay awake to generate next."""

    def _send_weights(self, version: int, engines: Sequence[Worker]) -> SyncReport:
        pool = self._pool(self._engines)
        pool.wake_weights()
        report = super()._send_weights(version, engines)
        pool.wake()
        return report
