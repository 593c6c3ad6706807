"""Processes that compute together: each a rank of a process group."""

# ruff: noqa: PLC0415

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.actors.actor import Actor, node_address
from rlhf.actors.calls import Call, Worker, wait_all
from rlhf.importing import importing

if TYPE_CHECKING:
    import socket


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """A process's place in the group whose models it shares."""

    rank: int
    world_size: int
    master_address: str
    master_port: int
    device: str
    timeout_s: float


class RankActor(Actor):
    """A process that can become a rank."""

    def __init__(self, folder: Path, log_file: Path | None) -> None:
        super().__init__(folder, log_file)
        self._listener: socket.socket | None = None

    def open_meeting(self) -> tuple[str, int]:
        """Listen for the group's other ranks on this node's address. Returns where."""
        from rlhf.engines.process.rendezvous import open_listener

        self._listener = open_listener(node_address())
        address, port = self._listener.getsockname()[:2]
        return str(address), int(port)

    def join(self, rank: Rank) -> None:
        """Enter the process group of the device group. Blocks until all ranks have."""
        with importing():
            from rlhf.engines.process.distributed import init_distributed
            from rlhf.engines.process.rendezvous import bind_collectives, open_store

        self._rank = rank
        bind_collectives(node_address())
        store = open_store(rank.rank, rank.master_address, rank.master_port, rank.timeout_s, self._listener)
        init_distributed(rank.rank, rank.world_size, store, device=rank.device, timeout_s=rank.timeout_s)


def join_ranks(
    groups: Sequence[Sequence[Worker]], *, device: str, start_timeout_s: float, collective_timeout_s: float
) -> None:
    """Let the processes of each group meet, in the order of their ranks; no collective of theirs may take longer than
    `collective_timeout_s`. Raises: as `wait_all`."""
    first = [Call(worker=ranks[0], ref=ranks[0].handle.open_meeting.remote()) for ranks in groups]
    addresses = wait_all(first, phase="meeting point of ranks", timeout_s=start_timeout_s)
    calls: list[Call] = []
    for ranks, place in zip(groups, addresses, strict=True):
        assert isinstance(place, tuple)
        for rank, worker in enumerate(ranks):
            meeting = Rank(
                rank=rank,
                world_size=len(ranks),
                master_address=place[0],
                master_port=place[1],
                device=device,
                timeout_s=collective_timeout_s,
            )
            calls.append(Call(worker=worker, ref=worker.handle.join.remote(meeting)))
    wait_all(calls, phase="meeting of ranks", timeout_s=start_timeout_s)
