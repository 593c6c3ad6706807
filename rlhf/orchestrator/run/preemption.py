"""Stopping a run by a signal. The first signal requests a checkpoint at the next safe point, within a grace period. A
second one, or the end of the grace period, ends the run at once; the last checkpoint is kept."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from rlhf.errors import PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Sent by Kubernetes and `ray job stop`, by Ctrl-C, and by SLURM (`--signal`)."""


class StopRequestedError(Exception):
    """Raised by `StopRequest.check` at a safe point, and caught by the loop alone."""


class StopRequest:
    """Whether the run was asked to stop. Shared by the loop and its source.

    `check` is called where weights are those of a finished step: between steps, and while waiting for rollouts.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._requested = threading.Event()
        self._timer: threading.Timer | None = None
        self._is_over = False
        self._has_safe_points = False
        self._interruption: PreemptedError | None = None

    @property
    def is_requested(self) -> bool:
        """Whether a stop was requested."""
        return self._requested.is_set()

    def request(self) -> None:
        """Request a stop at the next safe point."""
        self._requested.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until a stop is requested, or for `timeout_s`. Returns whether one was requested."""
        return self._requested.wait(timeout_s)

    def check(self) -> None:
        """Raise `StopRequestedError` where a stop was requested."""
        if self.is_requested:
            raise StopRequestedError

    @contextmanager
    def safe_points(self) -> Iterator[None]:
        """Inside, `check` is called regularly. Outside there is nothing to save, and a signal ends the run at once."""
        self.require_uninterrupted()
        self._has_safe_points = True
        try:
            yield
        finally:
            self._has_safe_points = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside this block. Python allows it in the main thread only; in others nothing is changed."""
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

    def require_uninterrupted(self) -> None:
        """Raise PreemptedError if a signal came and a library, such as Ray while it starts, caught what its handler
        raised."""
        if self._interruption is not None:
            raise self._interruption

    @contextmanager
    def naming_interruptions(self) -> Iterator[None]:
        """Raise what the handler of a signal raised inside, whatever a library made of it: Ray's C++ code turns an
        exception of a handler into a SystemError. Raises at once what came before and was caught."""
        self.require_uninterrupted()
        try:
            yield
        except BaseException as error:
            if self._interruption is not None and error is not self._interruption:
                raise self._interruption from error
            raise

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._has_safe_points:
            self._interrupt(f"stopped by {name} while the run starts; what was saved before is kept")
        if self._is_over:
            self._interrupt(
                f"no safe point within {self._grace_s:g} s of the signal; the last checkpoint is kept. "
                "Continue with --resume, and raise checkpoint.grace_s if the time allows"
            )
        if self.is_requested:
            self._interrupt(f"stopped at once by a second {name}; continue with --resume")
        self._requested.set()
        self._timer = threading.Timer(self._grace_s, self._end_grace)
        self._timer.daemon = True
        self._timer.start()

    def _interrupt(self, text: str) -> NoReturn:
        self._interruption = PreemptedError(text)
        raise self._interruption

    def _end_grace(self) -> None:
        """Interrupt the main thread, whatever it waits for: only a signal handler can raise there."""
        self._is_over = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
