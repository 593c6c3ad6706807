"""Workers that are ranks of a process group (torch.distributed)."""

# ruff: noqa: PLC0415

import os
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.actors.actor import node_address
from rlhf.actors.calls import Call, Worker
from rlhf.actors.rendezvous import RendezvousActor
from rlhf.actors.waiting import RemoteCalls
from rlhf.importing import importing


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """The place of a worker in its process group."""

    rank: int
    world_size: int
    master_address: str
    master_port: int
    device: str
    timeout_s: float


class RankActor(RendezvousActor):
    """A worker that can join a process group."""

    def join(self, rank: Rank) -> None:
        """Join the process group. Blocks until all ranks have joined."""
        with importing():
            from rlhf.engines.process.distributed import init_distributed
            from rlhf.engines.process.freed_memory import keep_freed_memory
            from rlhf.engines.process.rendezvous import bind_collectives, open_store

        self._rank = rank
        if rank.device == "cuda":
            self.see_gpus(self.gpus())
        else:
            keep_freed_memory(os.environ)
        bind_collectives(node_address())
        store = open_store(rank.rank, rank.master_address, rank.master_port, rank.timeout_s, self._listener)
        init_distributed(rank.rank, rank.world_size, store, device=rank.device, timeout_s=rank.timeout_s)


def join_ranks(
    groups: Sequence[Sequence[Worker]],
    *,
    calls: RemoteCalls,
    device: str,
    start_timeout_s: float,
    collective_timeout_s: float,
) -> None:
    """Set up a process group of each sequence of workers, in rank order. Their collectives fail after
    `collective_timeout_s`. Raises: as `RemoteCalls.run`."""
    first = [Call(worker=ranks[0], ref=ranks[0].handle.open_rendezvous.remote()) for ranks in groups]
    addresses = calls.wait_all(first, phase="rendezvous of ranks", timeout_s=start_timeout_s)
    joins: list[Call] = []
    for ranks, address in zip(groups, addresses, strict=True):
        assert isinstance(address, tuple)
        for rank, worker in enumerate(ranks):
            place = Rank(
                rank=rank,
                world_size=len(ranks),
                master_address=address[0],
                master_port=address[1],
                device=device,
                timeout_s=collective_timeout_s,
            )
            joins.append(Call(worker=worker, ref=worker.handle.join.remote(place)))
    calls.wait_all(joins, phase="setup of process groups", timeout_s=start_timeout_s)
