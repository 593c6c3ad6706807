"""Being asked to stop. The first signal asks for a checkpoint at the next safe point, within a grace
period; a second one, or the end of the grace period, ends the run at once with what is saved already."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rlhf.errors import PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Of Kubernetes and `ray job stop`, of Ctrl-C, and of SLURM (`--signal`)."""


class StopAskedError(Exception):
    """Raised by `StopRequest.check` at a safe point, and caught by the loop alone."""


class StopRequest:
    """Whether the run was asked to stop. Shared by the loop and its source.

    `check` is called where weights are those of a finished step: between steps, and while waiting for rollouts.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._asked = threading.Event()
        self._timer: threading.Timer | None = None
        self._is_over = False
        self._has_safe_points = False

    @property
    def asked(self) -> bool:
        """Whether somebody asked."""
        return self._asked.is_set()

    def ask(self) -> None:
        """Ask for a stop at the next safe point."""
        self._asked.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait, but no longer than until somebody asks. Returns whether somebody did."""
        return self._asked.wait(timeout_s)

    def check(self) -> None:
        """Raise `StopAskedError` where somebody asked."""
        if self.asked:
            raise StopAskedError

    @contextmanager
    def safe_points(self) -> Iterator[None]:
        """Inside, `check` is called now and then; elsewhere there is nothing to save, and a signal ends all at once."""
        self._has_safe_points = True
        try:
            yield
        finally:
            self._has_safe_points = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Answer signals inside this block. Only the main thread can; elsewhere `ask` is the only way."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if not self._has_safe_points:
            name = signal.Signals(number).name
            raise PreemptedError(f"stopped by {name} while the run starts; what was saved before stands")
        if self._is_over:
            raise PreemptedError(
                f"no safe point within {self._grace_s:g} s of the signal; the last checkpoint stands. "
                "Continue with --resume, and raise checkpoint.grace_s if the time allows"
            )
        if self.asked:
            raise PreemptedError(f"stopped at once by a second {signal.Signals(number).name}; continue with --resume")
        self._asked.set()
        self._timer = threading.Timer(self._grace_s, self._end_grace)
        self._timer.daemon = True
        self._timer.start()

    def _end_grace(self) -> None:
        """Interrupt the main thread, whatever it waits for: only a signal's handler can raise there."""
        self._is_over = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
