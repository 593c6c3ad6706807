"""The lag buffer: how far rollouts may run ahead of training (asynchronous, off-policy training)."""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from rlhf.errors import StallError

T = TypeVar("T")

POLL_S = 0.2
"""How often a waiting trainer checks whether it was asked to stop."""


class LagBuffer(Generic[T]):
    """Batches on their way from one producer thread to the trainer.

    There are max_lag + 1 slots. A batch takes a slot before its first token is sampled, and frees it when the weights
    that were trained on it are live in the rollout engines. So the batch of step k is sampled from version
    k - 1 - max_lag or a newer one, and is at most max_lag versions old when version k - 1 learns from it. With
    max_lag 0, sampling and training alternate.

    Example: max_lag 1, three steps, with slots A and B; the policy begins at version 0.

        step  slot  sampled while live  trained by  lag  frees its slot when
        1     A     version 0           version 0   0    version 1 is live
        2     B     version 0           version 1   1    version 2 is live
        3     A     version 1           version 2   1    version 3 is live

    Step 2 is sampled while step 1 trains: slot B is free. Step 3 must wait for slot A, until version 1 is live.

    >>> buffer = LagBuffer[str](max_lag=1, slot_timeout_s=0.01, take_timeout_s=1.0)
    >>> buffer.acquire(1)  # slot A
    True
    >>> buffer.acquire(2)  # slot B, also while version 0 is live
    True
    >>> buffer.put("step 1")
    >>> buffer.put("step 2")
    >>> buffer.acquire(3)
    Traceback (most recent call last):
    ...
    rlhf.errors.StallError: rollouts of step 3 waited 0.01 s for the trainer to free a slot: ...
    >>> buffer.take(1)  # version 0 learns from it, and becomes version 1
    'step 1'
    >>> buffer.release()  # version 1 is live: slot A is free
    >>> buffer.acquire(3)
    True

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
        """Hand over a batch. Never waits: a batch that holds a slot has room."""
        with self._changed:
            self._ready.append(batch)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Make `take` raise `error` once the trainer has taken the batches that are ready."""
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
        """Free the slot of a taken batch. Call it only once the weights that were trained on it are live."""
        with self._changed:
            if not self._taken:
                raise RuntimeError("a slot was released, and no batch was taken")
            self._taken -= 1
            self._free += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Unblock producer and trainer. No batch is produced any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
