"""Process groups whose members must make the same calls in the same order.

NCCL hangs where one does not come, and mixes up data where one makes another call. Here both are errors that name the
ranks and their calls.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.fake_cuda.machine import Gpu


class CollectiveError(RuntimeError):
    """A call that not all ranks made."""


@dataclass
class _Round:
    """The nth call of each rank."""

    calls: dict[int, str] = field(default_factory=dict)
    values: dict[int, object] = field(default_factory=dict)


class Group:
    """`size` ranks."""

    def __init__(self, name: str, size: int, timeout_s: float) -> None:
        self._name = name
        self._size = size
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._rounds: dict[int, _Round] = {}
        self._counts = [0] * size
        self._last = ["no call"] * size
        self._gpus: dict[int, Gpu] = {}
        self._error: str | None = None

    def join(self, rank: int, gpu: Gpu) -> None:
        """Wait for all ranks. Raises CollectiveError where two of them have the same GPU, as NCCL does."""
        self._gpus[rank] = gpu
        self.call(rank, "join", None)
        of_gpus: dict[Gpu, list[int]] = {}
        for other, its in sorted(self._gpus.items()):
            of_gpus.setdefault(its, []).append(other)
        for shared, ranks in of_gpus.items():
            if len(ranks) > 1:
                raise CollectiveError(f"{self._name}: Duplicate GPU detected: ranks {ranks} both on {shared.uuid}")

    def call(self, rank: int, what: str, value: object) -> Sequence[object]:
        """Make a call with all others; returns the values of all ranks, in order. Raises CollectiveError."""
        with self._changed:
            index, self._counts[rank] = self._counts[rank], self._counts[rank] + 1
            self._last[rank] = what
            made = self._rounds.setdefault(index, _Round())
            made.calls[rank], made.values[rank] = what, value
            if len(made.calls) == self._size:
                del self._rounds[index]
                if len(set(made.calls.values())) > 1:
                    self._error = f"{self._name}: ranks make different calls: {_listed(made.calls)}"
                self._changed.notify_all()
            deadline = time.monotonic() + self._timeout_s
            while len(made.calls) < self._size and self._error is None:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())) and time.monotonic() >= deadline:
                    self._error = self._missing(made)
                    self._changed.notify_all()
            if self._error is not None:
                raise CollectiveError(self._error)
            return [made.values[other] for other in range(self._size)]

    def leave(self, rank: int) -> None:
        """Nobody waits for this rank any more."""
        with self._changed:
            if self._error is None and any(self._rounds):
                self._error = f"{self._name}: rank {rank} has left"
                self._changed.notify_all()

    def _missing(self, made: _Round) -> str:
        late = {rank: self._last[rank] for rank in range(self._size) if rank not in made.calls}
        what = ", ".join(sorted(set(made.calls.values())))
        others = f"the last calls of the others: {_listed(late)}"
        return f"{self._name}: {what}: not all came in {self._timeout_s:g} s; {others}"


def _listed(calls: dict[int, str]) -> str:
    """Each call and the ranks that made it."""
    by_call: dict[str, list[int]] = {}
    for rank, what in sorted(calls.items()):
        by_call.setdefault(what, []).append(rank)
    return "; ".join(f"{what} (rank {', '.join(map(str, ranks))})" for what, ranks in by_call.items())
