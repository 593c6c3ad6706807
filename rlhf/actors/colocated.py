"""Rollout engines and models that take turns on the devices that they share."""

import threading
from collections.abc import Sequence

from rlhf.actors.probed import ProbedPolicy
from rlhf.engines.base import RolloutEngine
from rlhf.types import FloatArray, PackedTokens, Rollout, RolloutRequest, SyncReport


class SleepingRolloutPool:
    """Engines that are awake only while they answer, so that models can have the memory of the shared devices.

    Consumes: requests. Waits for: the engines to wake, and to fall asleep when the last of several calls at once is
    answered. A call that fails leaves them as they are: the run ends.
    """

    def __init__(self, engines: RolloutEngine) -> None:
        self._engines = engines
        self._lock = threading.Lock()
        self._num_calls = 0

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """As the engines', which are woken for it."""
        self._enter()
        rollouts = self._engines.generate(requests)
        self._leave()
        return rollouts

    def score(self, sequences: Sequence[PackedTokens]) -> list[FloatArray]:
        """As the engines', which are woken for it."""
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
    """The policy of engines that rest: it wakes them to send its weights. They stay awake, since they answer next."""

    def send_weights(self, version: int) -> SyncReport:
        """As `ProbedPolicy.send_weights`."""
        self._pool(self._engines).wake()
        return super().send_weights(version)
