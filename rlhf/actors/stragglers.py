"""Stragglers: workers that repeatedly delay the others, because of a slow node or a throttled or shared GPU."""

import threading
from collections.abc import Callable, Sequence
from statistics import median

from rlhf.actors.calls import Worker

FACTOR = 1.5
"""A worker is late if it takes this many times the median of the others."""
MIN_DELAY_S = 0.5
"""Shorter delays do not count."""
MAX_TIMES_LATE = 10
"""Responses differ in length, so a worker that is late now and then is not a straggler."""


class Stragglers:
    """A `CallObserver` that warns about a worker that is late several times in a row. Thread-safe.

    It finds slow engines, and slow ranks of models without collectives. With collectives, all ranks take as long as the
    slowest one.
    """

    def __init__(
        self, warn: Callable[[str], None], *, min_delay_s: float = MIN_DELAY_S, times_late: int = MAX_TIMES_LATE
    ) -> None:
        self._warn = warn
        self._min_delay_s = min_delay_s
        self._times_late = times_late
        self._late: dict[str, tuple[str, int]] = {}
        """The last worker of each kind of wait, and how many times in a row it was late."""
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def wait_started(self, phase: str) -> None:
        """Only the ends of waits matter."""

    def workers_awaited(self, phase: str, workers: Sequence[Worker]) -> None:
        """Only the ends of waits matter."""

    def wait_succeeded(self, phase: str, seconds: Sequence[tuple[Worker, float]]) -> None:
        """Compare the workers of one wait."""
        if len({str(worker) for worker, _ in seconds}) < 2:
            return
        kind = phase.rstrip("0123456789")  # without the weight version
        *others, (last, took_s) = sorted(seconds, key=lambda one: one[1])
        usual_s = median(other_s for _, other_s in others)
        is_late = took_s > FACTOR * usual_s and took_s - usual_s > self._min_delay_s
        name = str(last)
        with self._lock:
            before, count = self._late.get(kind, ("", 0))
            count = (count if name == before else 0) + 1 if is_late else 0
            self._late[kind] = name, count
            if count < self._times_late or name in self._warned:
                return
            self._warned.add(name)
        self._warn(
            f"{name} is a straggler: it was late {count} times in a row. "
            f"The last {phase} took it {took_s:.1f} s, and the others {usual_s:.1f} s. Check its node"
        )
