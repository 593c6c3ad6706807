"""Sleep mode of rollout engines that are colocated with models (a hybrid engine): they compute alternately."""

import threading
from collections.abc import Sequence

from rlhf.actors.probed import ProbedPolicy
from rlhf.engines.base import RolloutEngine
from rlhf.types import FloatArray, PackedTokens, Rollout, RolloutRequest, SyncReport


class SleepingRolloutPool:
    """Engines that are awake only while they generate, so that models can use the memory of the shared devices.

    Consumes: requests. Waits for: the engines to wake up, and to sleep after the last of several concurrent calls. A
    call that fails leaves them awake: the attempt ends.
    """

    def __init__(self, engines: RolloutEngine) -> None:
        self._engines = engines
        self._lock = threading.Lock()
        self._num_calls = 0

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """As the engines' method. Wakes them first."""
        self._enter()
        rollouts = self._engines.generate(requests)
        self._leave()
        return rollouts

    def score(self, sequences: Sequence[PackedTokens]) -> list[FloatArray]:
        """As the engines' method. Wakes them first."""
        self._enter()
        log_probs = self._engines.score(sequences)
        self._leave()
        return log_probs

    def sleep(self) -> None:
        self._engines.sleep()

    def wake(self) -> None:
        self._engines.wake()

    def close(self) -> None:
        self._engines.close()

    def _enter(self) -> None:
        with self._lock:
            if not self._num_calls:
                self._engines.wake()
            self._num_calls += 1

    def _leave(self) -> None:
        with self._lock:
            self._num_calls -= 1
            if not self._num_calls:
                self._engines.sleep()


class WakeBeforeSync(ProbedPolicy):
    """The policy of engines in sleep mode: it wakes them before a weight sync. They stay awake to generate next."""

    def send_weights(self, version: int) -> SyncReport:
        """As `ProbedPolicy.send_weights`."""
        self._pool(self._engines).wake()
        return super().send_weights(version)
