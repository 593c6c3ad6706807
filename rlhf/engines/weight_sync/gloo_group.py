"""The gloo process group that weights are broadcast in, and the messages that set it up."""

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


@dataclass(frozen=True, slots=True)
class GlooInitInfo:
    """What a receiver needs to join. An engine with tensor parallel size t has t ranks, starting at `rank_offset`."""

    engine: str
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class GlooUpdateInfo:
    """One version: the dtype that is sent, and the layout of every bucket as `to_info` gives it."""

    version: int
    dtype: str
    buckets: Sequence[Sequence[tuple[str, Sequence[int]]]]


def listen(address: str, port: int, timeout_s: float) -> TCPStore:
    """Serve the TCP store that the group is built on; port 0 chooses a free port."""
    return serve_store(open_listener(address, port), timeout_s)


def connect(info: GlooInitInfo) -> TCPStore:
    """Connect to the sender's TCP store."""
    return join_store(info.master_address, info.master_port, info.timeout_s)


FREE_REFERENCES = 2
"""Reference count of an array that only the pool refers to: the pool's list, and the argument of `getrefcount`."""


class _Broadcasting(Protocol):
    """A method of ProcessGroupGloo that torch's type stubs lack."""

    def broadcast(self, tensor: torch.Tensor, root: int) -> dist.Work: ...


class GlooGroup:
    """One rank of the group; independent of the default process group."""

    def __init__(self, store: TCPStore, rank: int, world_size: int, timeout_s: float) -> None:
        """Join; blocks until all ranks have joined. Raises RuntimeError after `timeout_s`."""
        prefixed = PrefixStore("weights", store)
        group = dist.ProcessGroupGloo(prefixed, rank, world_size, timedelta(seconds=timeout_s))
        self._group: _Broadcasting | None = cast(_Broadcasting, group)

    def broadcast(self, buffer: torch.Tensor) -> dist.Work:
        """Start a broadcast from rank 0. Until it is done the buffer must be kept alive, and not be read or written.
        Raises RuntimeError if the group or a connection is closed."""
        if self._group is None:
            raise RuntimeError("the weight transfer group was closed on this rank")
        return self._group.broadcast(buffer, 0)

    def close(self) -> None:
        """Close the connections, so that the other ranks notice at once. Only destroying the group does that: gloo's
        `shutdown` and `abort` leave connections open."""
        self._group = None


class BufferPool:
    """Buffers that are reused as soon as no tensor views them: touching memory fresh from the system costs more time
    than receiving the weights.

    A buffer's bytes belong to a numpy array, which every tensor over them keeps alive; an array that only the pool
    refers to is free. So a loader may keep views for as long as it needs.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._arrays: list[npt.NDArray[np.uint8]] = []

    def take(self, nbytes: int) -> torch.Tensor:
        """An uninitialized uint8 tensor [nbytes]; `nbytes` is at most the pool's."""
        for index in range(len(self._arrays)):
            if sys.getrefcount(self._arrays[index]) == FREE_REFERENCES:
                return torch.from_numpy(self._arrays[index])[:nbytes]
        self._arrays.append(np.empty(self.nbytes, dtype=np.uint8))
        return torch.from_numpy(self._arrays[-1])[:nbytes]


def joined_key(rank: int) -> str:
    """Store key that a receiver sets when it has joined."""
    return f"joined/{rank}"


def progress_key(version: int, rank: int) -> str:
    """Store key in which a receiver counts the buckets of a version that it has verified."""
    return f"progress/{version}/{rank}"
