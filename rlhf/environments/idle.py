"""How long a user's own loop has asked for nothing."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class IdleClock:
    """Runs while no request is under way: time in which the policy answers is not the loop's."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._idle_s = 0.0
        """Of all times without a request that are over."""
        self._since = time.monotonic()
        self._num_busy = 0

    @contextmanager
    def busy(self) -> Iterator[None]:
        """A request is under way."""
        if not self._num_busy:
            self._idle_s += time.monotonic() - self._since
        self._num_busy += 1
        try:
            yield
        finally:
            self._num_busy -= 1
            self._since = time.monotonic()

    @property
    def total_s(self) -> float:
        """Seconds without a request so far."""
        return self._idle_s + (0.0 if self._num_busy else time.monotonic() - self._since)

    def left_s(self) -> float:
        """Seconds until it has been idle for too long, if no request comes."""
        return self.timeout_s if self._num_busy else self.timeout_s - (time.monotonic() - self._since)

    def restart(self) -> None:
        """The loop begins now."""
        self._since = time.monotonic()
