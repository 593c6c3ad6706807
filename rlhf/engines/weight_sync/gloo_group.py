"""The gloo group that weights travel through, and the messages that set it up."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from rlhf.engines.process.rendezvous import join_store, open_listener, serve_store
from rlhf.errors import WeightSyncError


@dataclass(frozen=True, slots=True)
class GlooInitInfo:
    """What a receiver needs to join. An engine of t processes takes t ranks, from `rank_offset` on."""

    engine: str
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class GlooUpdateInfo:
    """One version: the dtype of the wire and the layout of every bucket, as `to_info` gives it."""

    version: int
    dtype: str
    buckets: Sequence[Sequence[tuple[str, Sequence[int]]]]


def listen(address: str, port: int, timeout_s: float) -> TCPStore:
    """The store that the group is built on, served by this process; port 0 takes a free one."""
    return serve_store(open_listener(address, port), timeout_s)


def connect(info: GlooInitInfo) -> TCPStore:
    """The store of the sender."""
    return join_store(info.master_address, info.master_port, info.timeout_s)


FREE_REFERENCES = 2
"""The pool's own, and that of asking."""


class _Broadcasting(Protocol):
    """What torch's stubs do not say of ProcessGroupGloo."""

    def broadcast(self, tensor: torch.Tensor, root: int) -> dist.Work: ...


class GlooGroup:
    """One process's end of the group; independent of the default group."""

    def __init__(self, store: TCPStore, rank: int, world_size: int, timeout_s: float) -> None:
        """Join; blocks until all have. Raises RuntimeError on time-out."""
        prefixed = PrefixStore("weights", store)
        group = dist.ProcessGroupGloo(prefixed, rank, world_size, timedelta(seconds=timeout_s))
        self._group: _Broadcasting | None = cast(_Broadcasting, group)

    def broadcast(self, buffer: torch.Tensor) -> dist.Work:
        """From rank 0 to all. The buffer must live, unread and unwritten, until the work is done."""
        if self._group is None:
            raise WeightSyncError("this end of the weight transfer group was closed")
        return self._group.broadcast(buffer, 0)

    def close(self) -> None:
        """Close the connections, so that the others notice at once. Only the end of the object does that: gloo's
        `shutdown` and `abort` leave them open."""
        self._group = None


class BufferPool:
    """Buffers that are used again as soon as nothing looks into them: memory fresh from the system costs more to touch
    than the weights cost to receive.

    A buffer's bytes belong to a numpy array, which every tensor over them keeps alive; an array that nobody but the
    pool refers to is free. A loader may thus keep views as long as it likes.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._arrays: list[npt.NDArray[np.uint8]] = []

    def take(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], at most the pool's size; holds anything."""
        for index in range(len(self._arrays)):
            if sys.getrefcount(self._arrays[index]) == FREE_REFERENCES:
                return torch.from_numpy(self._arrays[index])[:nbytes]
        self._arrays.append(np.empty(self.nbytes, dtype=np.uint8))
        return torch.from_numpy(self._arrays[-1])[:nbytes]


def joined_key(rank: int) -> str:
    """Where a receiver says that it is there."""
    return f"joined/{rank}"


def progress_key(version: int, rank: int) -> str:
    """Where a receiver counts the buckets of a version that it has verified."""
    return f"progress/{version}/{rank}"
