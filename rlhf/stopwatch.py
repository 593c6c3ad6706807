"""How long something went on."""

import time
from collections.abc import Callable


class Stopwatch:
    """Seconds in which something was under way."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds = 0.0
        self._since: float | None = None

    def run(self, is_running: bool) -> None:
        """It is under way from now on, or not any more."""
        if self._since is not None:
            self._seconds += self._clock() - self._since
        self._since = self._clock() if is_running else None

    def take(self) -> float:
        """The seconds since the last call."""
        self.run(self._since is not None)
        seconds, self._seconds = self._seconds, 0.0
        return seconds
