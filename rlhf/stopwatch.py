"""How long something went on."""

import time
from collections.abc import Callable


class Stopwatch:
    """Seconds in which something was under way."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds = 0.0
        self._since: float | None = None
        self._is_running = self._is_held = False

    def run(self, is_running: bool) -> None:
        """It is under way from now on, or not any more."""
        self._is_running = is_running
        self._count()

    def hold(self, is_held: bool) -> None:
        """From now on it does not count even while it is under way; or counts again."""
        self._is_held = is_held
        self._count()

    def take(self) -> float:
        """The seconds since the last call."""
        self._count()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _count(self) -> None:
        if self._since is not None:
            self._seconds += self._clock() - self._since
        self._since = self._clock() if self._is_running and not self._is_held else None
