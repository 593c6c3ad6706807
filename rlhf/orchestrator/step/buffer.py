"""The lag buffer: how far rollouts may run ahead of training."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from rlhf.errors import StallError

T = TypeVar("T")

POLL_S = 0.2
"""How often a waiting trainer looks whether it was asked to stop."""


class LagBuffer(Generic[T]):
    """Batches on their way from one producer thread to the trainer.

    A batch holds a slot from before its first token is sampled until the weights that it taught are live. With
    max_lag + 1 slots, the batch of step k starts when version k - 1 - max_lag is live at the earliest, so its
    rollouts are at most max_lag versions old when version k - 1 learns from them; max_lag 0 is strictly synchronous.

    Producer
        consumes: slots. Produces: batches. Waits for: a slot (`acquire`). Unblocked by: `release`, `close`.
    Trainer
        consumes: batches. Produces: slots. Waits for: a batch (`take`). Unblocked by: `put`, `fail`, `close`, or
        `check` raising because the run was asked to stop.
    """

    def __init__(
        self,
        *,
        max_lag: int,
        slot_timeout_s: float,
        take_timeout_s: float,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._free = max_lag + 1
        self._taken = 0
        self._ready: deque[T] = deque()
        self._failure: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._slot_timeout_s = slot_timeout_s
        self._take_timeout_s = take_timeout_s
        self._check = check

    def acquire(self, step: int) -> bool:
        """Wait for a slot for the batch of `step`. False: the buffer was closed, produce no more."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or self._free > 0, self._slot_timeout_s):
                raise StallError(
                    f"rollouts of step {step} waited {self._slot_timeout_s:g} s for the trainer to free a slot: "
                    f"no weights became live in that time ({self._taken} batches in training)"
                )
            if self._closed:
                return False
            self._free -= 1
            return True

    def put(self, batch: T) -> None:
        """Hand over a batch. Never waits: who holds a slot has room."""
        with self._changed:
            self._ready.append(batch)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Let the trainer raise `error` once it has taken what is ready."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def take(self, step: int) -> T:
        """Wait for the next batch, the one of `step`. Its slot stays taken until `release`."""
        deadline = time.monotonic() + self._take_timeout_s
        with self._changed:
            while not self._ready:
                if self._failure is not None:
                    raise self._failure
                if self._closed:
                    raise RuntimeError("the lag buffer is closed")
                self._check()
                if time.monotonic() > deadline:
                    raise StallError(
                        f"the trainer waited {self._take_timeout_s:g} s for the rollouts of step {step}: "
                        "the producer has sampled or scored no whole batch in that time"
                    )
                self._changed.wait(POLL_S)
            self._taken += 1
            return self._ready.popleft()

    def release(self) -> None:
        """Give the slot of a taken batch back. Call it only once the weights that it taught are live."""
        with self._changed:
            if not self._taken:
                raise RuntimeError("a slot was released that nobody took")
            self._taken -= 1
            self._free += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Unblock everybody; nothing is produced any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
