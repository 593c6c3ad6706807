"""The gloo group that weights travel through, and the messages that set it up."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

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


class BroadcastGroup(Protocol):
    """The part of a process group that is used."""

    def broadcast(self, tensor: torch.Tensor, root: int) -> dist.Work: ...

    def shutdown(self) -> None: ...


def listen(address: str, port: int, timeout_s: float) -> TCPStore:
    """The store that the group is built on, served by this process; port 0 takes a free one."""
    try:
        timeout = timedelta(seconds=timeout_s)
        return TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:
        raise WeightSyncError(f"cannot listen on {address}:{port} for rollout engines: {error}") from error


def connect(info: GlooInitInfo) -> TCPStore:
    """The store of the sender."""
    return TCPStore(info.master_address, info.master_port, timeout=timedelta(seconds=info.timeout_s))


def open_group(store: TCPStore, rank: int, world_size: int, timeout_s: float) -> BroadcastGroup:
    """Join the group; blocks until all have. Independent of the default group. Raises RuntimeError on time-out."""
    prefixed = PrefixStore("weights", store)
    return cast(BroadcastGroup, dist.ProcessGroupGloo(prefixed, rank, world_size, timedelta(seconds=timeout_s)))


def joined_key(rank: int) -> str:
    """Where a receiver says that it is there."""
    return f"joined/{rank}"


def progress_key(version: int, rank: int) -> str:
    """Where a receiver counts the buckets of a version that it has verified."""
    return f"progress/{version}/{rank}"
