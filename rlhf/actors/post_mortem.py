"""Examining processes that do not reply: their state in the kernel, and the stacks of their threads.

A process that hangs in a collective or was stopped does not reply to calls. The first still gets signals, and the
handler, C code that does not need the interpreter's lock, writes the stack of every thread to a file. The second gets
nothing, but the kernel reports that it is stopped. Both are examined by a process on the same node.
"""

import contextlib
import faulthandler
import logging
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import ray
from ray.exceptions import RayError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf.errors import WorkerLostError

logger = logging.getLogger(__name__)

SIGNAL = signal.SIGUSR2
SUFFIX = ".stacks.txt"
EXAMINE_TIMEOUT_S = 8.0
"""Longest wait for a node's reply. A lost node never replies."""
WRITE_STACKS_S = 0.3
KILL_TIMEOUT_S = 30.0
"""Longest wait for the end of processes that were killed: the kernel takes seconds to free tens of GB of pinned memory,
which a sleeping engine and offloaded optimizer states hold."""
FINDINGS: Mapping[str, str] = {
    psutil.STATUS_STOPPED: "is stopped (by SIGSTOP or a debugger)",
    psutil.STATUS_TRACING_STOP: "is stopped by a debugger",
    psutil.STATUS_ZOMBIE: "is dead",
    psutil.STATUS_DISK_SLEEP: "is waiting for a disk or device",
}
GONE = "is gone"
UNREACHABLE = "is on a node that does not reply"
ENDED = frozenset({GONE, UNREACHABLE, FINDINGS[psutil.STATUS_ZOMBIE]})
"""What is found of a process that will not go on."""

Process = tuple[str, int]
"""A node's id in Ray, and the id of a process there."""
LocalProcess = tuple[int, Path | None]
"""The id of a process on a node, and the file for its stacks."""


def stacks_file(log_file: Path) -> Path:
    """The file for the stacks of the process that logs to `log_file`."""
    return log_file.with_suffix(SUFFIX)


def write_stacks_on_signal(log_file: Path) -> None:
    """Let SIGUSR2 write the stacks of this process's threads. Does nothing where the folder does not exist."""
    with contextlib.suppress(OSError):
        # Kept open while the process lives: the handler writes to the descriptor.
        faulthandler.register(SIGNAL, stacks_file(log_file).open("a"), all_threads=True)


def examine(processes: Mapping[str, Sequence[LocalProcess]]) -> dict[Process, str]:
    """Find out on every node, by its id in Ray, what is wrong with processes, and have these write their stacks.

    Returns: process -> what is wrong with it, without processes that are well.
    """
    found, unreachable = _on_nodes(examine_local, processes, EXAMINE_TIMEOUT_S)
    return {**found, **dict.fromkeys(unreachable, UNREACHABLE)}


def find_stopped(processes: Mapping[str, Sequence[LocalProcess]]) -> set[Process]:
    """The processes that were stopped by SIGSTOP, but not by a debugger, on the nodes that reply."""
    found, _ = _on_nodes(_stopped_local, processes, EXAMINE_TIMEOUT_S)
    return set(found)


def kill(processes: Mapping[str, Sequence[LocalProcess]]) -> dict[Process, str]:
    """Kill processes and their children, also those that are stopped, and wait for their end.

    Returns: those that did not end, as `examine`. A node that does not reply counts as lost.
    """
    found, _ = _on_nodes(_kill_local, processes, KILL_TIMEOUT_S + EXAMINE_TIMEOUT_S)
    return found


def send_signal(node_id: str, pid: int, number: int) -> None:
    """Send a signal to a Ray process on a node, to test how a run reacts.

    Raises:
        WorkerLostError: there is no such process, or its node does not reply.
    """
    signaled, _ = _on_nodes(_signal_local, {node_id: [(pid, None)]}, EXAMINE_TIMEOUT_S, number)
    if not signaled:
        raise WorkerLostError(f"process {pid} of node {node_id} is not one of this run's, or its node is gone")


def _on_nodes(
    task: Callable[..., dict[int, str]],
    processes: Mapping[str, Sequence[LocalProcess]],
    timeout_s: float,
    *arguments: int,
) -> tuple[dict[Process, str], list[Process]]:
    """Run `task` on every node; directly on this one. Returns its findings, and the processes of nodes that did not
    reply in time."""
    this_node = ray.get_runtime_context().get_node_id()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    remote = ray.remote(num_cpus=0, max_retries=0)(task)
    asked = {}
    for node, local in processes.items():
        if node != this_node and node in alive:
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            asked[remote.options(scheduling_strategy=strategy).remote(list(local), *arguments)] = node
    found = {}
    if this_node in processes:
        found = {(this_node, pid): text for pid, text in task(processes[this_node], *arguments).items()}
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s) if asked else ([], [])
    unreachable = [asked[ref] for ref in late] + [node for node in processes if node != this_node and node not in alive]
    for ref in ready:
        try:
            found |= {(asked[ref], pid): text for pid, text in ray.get(ref).items()}
        except TaskUnschedulableError:  # the node was lost meanwhile
            unreachable.append(asked[ref])
        except RayError as error:
            logger.warning("a node could not be asked about its processes: %s", str(error).splitlines()[0])
            unreachable.append(asked[ref])
    return found, [(node, pid) for node in unreachable for pid, _ in processes[node]]


def examine_local(processes: Sequence[LocalProcess]) -> dict[int, str]:
    """As `examine`, for processes of this machine."""
    found = {}
    for pid, file in processes:
        try:
            process = _actor(pid)
            status = process.status()
            if status in FINDINGS:
                found[pid] = FINDINGS[status]
            elif stopped := _stopped_children(process):
                found[pid] = f"waits for its child processes {', '.join(stopped)}"
            if file is not None and _takes_signal(pid):
                with contextlib.suppress(OSError):
                    os.truncate(file, 0)
                process.send_signal(SIGNAL)
        except psutil.Error:
            found[pid] = GONE
    time.sleep(WRITE_STACKS_S)
    return found


def _stopped_children(process: psutil.Process) -> list[str]:
    """The processes below an actor that are stopped: a tensor-parallel engine computes in processes of its own."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            status = child.status()
            if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
                found.append(f"{child.pid} ({child.name()}), which {FINDINGS[status]}")
    return found


def _stopped_local(processes: Sequence[LocalProcess]) -> dict[int, str]:
    found = {}
    for pid, _ in processes:
        with contextlib.suppress(psutil.Error):
            status = _actor(pid).status()
            if status == psutil.STATUS_STOPPED:
                found[pid] = FINDINGS[status]
    return found


def _signal_local(processes: Sequence[LocalProcess], number: int) -> dict[int, str]:
    signaled = {}
    for pid, _ in processes:
        with contextlib.suppress(psutil.Error):
            _actor(pid).send_signal(number)
            signaled[pid] = "got the signal"
    return signaled


def _kill_local(processes: Sequence[LocalProcess]) -> dict[int, str]:
    alive: dict[psutil.Process, int] = {}
    for pid, _ in processes:
        with contextlib.suppress(psutil.Error):
            actor = _actor(pid)
            alive |= dict.fromkeys([actor, *actor.children(recursive=True)], pid)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    _, left = psutil.wait_procs(alive, timeout=KILL_TIMEOUT_S)
    return {alive[process]: "did not end when it was killed" for process in left}


def _actor(pid: int) -> psutil.Process:
    """The process, if it is a Ray process: the id may have been reused by another one."""
    process = psutil.Process(pid)
    if process.status() != psutil.STATUS_ZOMBIE and not "".join(process.cmdline()[:1]).startswith("ray::"):
        raise psutil.NoSuchProcess(pid)
    return process


def _takes_signal(pid: int) -> bool:
    """Whether the process has a handler for the signal, which would kill it otherwise."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), 0)
    return bool(caught >> (SIGNAL - 1) & 1)


def by_node(processes: Sequence[tuple[str, LocalProcess]]) -> dict[str, list[LocalProcess]]:
    """Group processes by their nodes."""
    nodes: dict[str, list[LocalProcess]] = defaultdict(list)
    for node, process in processes:
        nodes[node].append(process)
    return nodes
