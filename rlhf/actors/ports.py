"""The ports that the workers of a run listen on. A run shows at its start which can be reached from other machines."""

from collections.abc import Sequence
from typing import cast

import psutil

from rlhf.actors.calls import Call, Worker
from rlhf.actors.connection import is_loopback
from rlhf.actors.waiting import RemoteCalls


def listening() -> list[tuple[str, int]]:
    """Address and port of every TCP socket on which this process or a child of it listens."""
    own = psutil.Process()
    found = [one for process in (own, *own.children(recursive=True)) for one in process.net_connections(kind="tcp")]
    return sorted({(one.laddr.ip, one.laddr.port) for one in found if one.status == psutil.CONN_LISTEN})


def open_ports(workers: Sequence[Worker], calls: RemoteCalls, timeout_s: float) -> list[str]:
    """A line for each worker that other machines can reach, or one line if there is none.

    Raises: as `RemoteCalls.run`.
    """
    asked = [Call(worker=worker, ref=worker.handle.listening.remote()) for worker in workers]
    found = calls.wait_all(asked, phase="listing of open ports", timeout_s=timeout_s)
    lines = []
    for worker, ports in zip(workers, found, strict=True):
        listening_on = cast(list[tuple[str, int]], ports)
        if exposed := [f"{host}:{port}" for host, port in listening_on if not is_loopback(host)]:
            lines.append(f"  {worker.name} listens on {', '.join(exposed)}")
    return lines or ["  all listen on loopback only"]
