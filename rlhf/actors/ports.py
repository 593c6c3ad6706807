"""What the processes of a run listen on: said at its start, so that nobody is surprised by an open port."""

from collections.abc import Sequence
from typing import cast

import psutil

from rlhf.actors.calls import Call, Worker, wait_all
from rlhf.actors.connection import is_loopback


def listening() -> list[tuple[str, int]]:
    """Address and port of every TCP socket on which this process or a child of it listens."""
    own = psutil.Process()
    found = [one for process in (own, *own.children(recursive=True)) for one in process.net_connections(kind="tcp")]
    return sorted({(one.laddr.ip, one.laddr.port) for one in found if one.status == psutil.CONN_LISTEN})


def open_ports(workers: Sequence[Worker], timeout_s: float) -> list[str]:
    """A line for each process that other machines can reach; one line where none can. Raises: as `wait_all`."""
    calls = [Call(worker=worker, ref=worker.handle.listening.remote()) for worker in workers]
    answers = wait_all(calls, phase="look at open ports", timeout_s=timeout_s)
    lines = []
    for worker, answer in zip(workers, answers, strict=True):
        held = cast(list[tuple[str, int]], answer)
        if beyond := [f"{host}:{port}" for host, port in held if not is_loopback(host)]:
            lines.append(f"  {worker.name} listens on {', '.join(beyond)}")
    return lines or ["  all listen on loopback only"]
