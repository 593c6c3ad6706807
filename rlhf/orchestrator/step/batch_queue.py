"""Batches on their way from the stream of rollouts to the trainer."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from rlhf.errors import StallError

T = TypeVar("T")

POLL_S = 0.2
"""How often a waiting trainer checks whether it was asked to stop."""


class BatchQueue(Generic[T]):
    """Hands batches from one thread to the trainer, in order. Never full: how many batches there may be is the rule of
    the stream that forms them (`GroupStream`).

    The trainer
        consumes: batches. Waits for: a batch (`take`). Unblocked by: `put`, `fail`, `close`, the deadline, or `check`
        raising because the run was asked to stop.
    """

    def __init__(self, *, take_timeout_s: float, check: Callable[[], None] = lambda: None) -> None:
        self._ready: deque[T] = deque()
        self._failure: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._take_timeout_s = take_timeout_s
        self._progress = 0.0
        self._check = check

    def put(self, batch: T) -> None:
        """Hand over a batch."""
        with self._changed:
            self._ready.append(batch)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Make `take` raise `error` once the trainer has taken the batches that are ready."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def mark_progress(self) -> None:
        """Something that the next batch needs is done: the deadline of who waits for it begins anew."""
        self._progress = time.monotonic()

    def take(self, step: int) -> T:
        """Wait for the next batch, the one of `step`. Raises StallError after `take_timeout_s` without progress."""
        self._progress = time.monotonic()
        with self._changed:
            while not self._ready:
                if self._failure is not None:
                    raise self._failure
                if self._closed:
                    raise RuntimeError("the queue of batches is closed")
                self._check()
                if time.monotonic() > self._progress + self._take_timeout_s:
                    raise StallError(
                        f"the trainer waited {self._take_timeout_s:g} s for the rollouts of step {step}: "
                        "no response was completed or scored in that time"
                    )
                self._changed.wait(POLL_S)
            return self._ready.popleft()

    def close(self) -> None:
        """Unblock the trainer. No batch comes any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
