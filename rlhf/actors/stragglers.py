"""Processes that keep their like waiting, time after time: a slow node, a GPU that is throttled or shared."""

import threading
from collections.abc import Callable, Sequence
from statistics import median

from rlhf.actors.calls import Worker

FACTOR = 1.5
"""Longer than the others' median by so much is late."""
LEAST_S = 0.5
"""Less than this is nobody's trouble."""
TIMES = 10
"""Answers differ in length: who is late now and then, or takes turns with others, is not slow."""


class Stragglers:
    """Sees how long each process of a group took to answer, wait by wait, and tells of one that is the last in a row
    of them. Thread-safe.

    Ranks that meet in collectives all take as long as the slowest, so it cannot be told among them: engines are, and
    models whose ranks compute by themselves.
    """

    def __init__(self, tell: Callable[[str], None], *, least_s: float = LEAST_S, times: int = TIMES) -> None:
        self._tell = tell
        self._least_s = least_s
        self._times = times
        self._late: dict[str, tuple[str, int]] = {}
        """The last process, and how many waits in a row it has been that, by what was waited for."""
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def see(self, phase: str, seconds: Sequence[tuple[Worker, float]]) -> None:
        """Take note of one wait: the workers, and when each had answered."""
        if len(seconds) < 2:
            return
        kind = phase.rstrip("0123456789")  # of whatever version
        *others, (last, took_s) = sorted(seconds, key=lambda one: one[1])
        usual_s = median(other_s for _, other_s in others)
        is_late = took_s > FACTOR * usual_s and took_s - usual_s > self._least_s
        name = str(last)
        with self._lock:
            before, count = self._late.get(kind, ("", 0))
            count = (count if name == before else 0) + 1 if is_late else 0
            self._late[kind] = name, count
            if count < self._times or name in self._told:
                return
            self._told.add(name)
        self._tell(
            f"{name} keeps the others waiting: {count} times in a row it was the last by far. "
            f"This time {phase} took it {took_s:.1f} s, and the others {usual_s:.1f} s. Look at its node"
        )
