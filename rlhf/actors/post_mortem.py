"""Looking at processes that do not answer: how the kernel has them, and where their threads stand.

A process that hangs in a collective, or that somebody stopped, answers no call. A signal still reaches the first, and
its handler, which is C code that needs no lock of the interpreter, writes every thread's stack into a file. Nothing
reaches the second, but the kernel says that it is stopped. Both are asked from a process on the same node.
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
LOOK_TIMEOUT_S = 8.0
"""Longest wait for a node's answer. A node that is gone has none."""
WRITING_S = 0.3
END_TIMEOUT_S = 10.0
"""Longest wait for the end of processes that were killed."""
FINDINGS: Mapping[str, str] = {
    psutil.STATUS_STOPPED: "is stopped (by SIGSTOP or a debugger)",
    psutil.STATUS_TRACING_STOP: "is stopped by a debugger",
    psutil.STATUS_ZOMBIE: "is dead",
    psutil.STATUS_DISK_SLEEP: "waits for a disk or device",
}
GONE = "is gone"
SILENT = "is on a node that does not answer"

Process = tuple[str, int]
"""A node's name in Ray, and a process's id there."""
Place = tuple[int, Path | None]
"""A process's id, and the file for its stacks."""


def stacks_file(log_file: Path) -> Path:
    """Where the process that logs into `log_file` leaves its stacks."""
    return log_file.with_suffix(SUFFIX)


def leave_stacks(log_file: Path) -> None:
    """Let SIGUSR2 write the stacks of this process's threads. Not where its folder cannot be seen."""
    with contextlib.suppress(OSError):
        # Open as long as the process lives: the handler writes to its descriptor.
        faulthandler.register(SIGNAL, stacks_file(log_file).open("a"), all_threads=True)


def look(places: Mapping[str, Sequence[Place]]) -> dict[Process, str]:
    """Ask every node (by its name in Ray) about processes on it, and have these write their stacks.

    Returns: process -> what is wrong with it, for those with which something is.
    """
    found, silent = _on_nodes(look_here, places, LOOK_TIMEOUT_S)
    return {**found, **dict.fromkeys(silent, SILENT)}


def stopped(places: Mapping[str, Sequence[Place]]) -> set[Process]:
    """Which processes somebody has stopped, by SIGSTOP. A debugger that looks at one stops it otherwise; what a node
    that does not answer has stopped is not known."""
    found, _ = _on_nodes(_stopped_here, places, LOOK_TIMEOUT_S)
    return set(found)


def end(places: Mapping[str, Sequence[Place]]) -> dict[Process, str]:
    """Kill processes and their children, also where they are stopped and obey nobody else.

    Returns: those that are still there, as `look`; a node that does not answer is taken to be gone.
    """
    found, _ = _on_nodes(_end_here, places, END_TIMEOUT_S + LOOK_TIMEOUT_S)
    return found


def strike(node_id: str, pid: int, number: int) -> None:
    """Send a signal to one of Ray's processes on a node; for tests of what a run does then.

    Raises:
        WorkerLostError: there is no such process, or its node does not answer.
    """
    struck, _ = _on_nodes(_strike_here, {node_id: [(pid, None)]}, LOOK_TIMEOUT_S, number)
    if not struck:
        raise WorkerLostError(f"process {pid} of node {node_id} is not one of this run's, or its node is gone")


def _on_nodes(
    task: Callable[..., dict[int, str]],
    places: Mapping[str, Sequence[Place]],
    timeout_s: float,
    *arguments: int,
) -> tuple[dict[Process, str], list[Process]]:
    """What `task` finds on every node, on this process's own directly; and the processes of nodes that do not answer in
    time."""
    here = ray.get_runtime_context().get_node_id()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    remote = ray.remote(num_cpus=0, max_retries=0)(task)
    asked = {}
    for node, processes in places.items():
        if node != here and node in alive:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            asked[remote.options(scheduling_strategy=there).remote(list(processes), *arguments)] = node
    found = {}
    if here in places:
        found = {(here, pid): text for pid, text in task(places[here], *arguments).items()}
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s) if asked else ([], [])
    silent = [asked[ref] for ref in late] + [node for node in places if node != here and node not in alive]
    for ref in ready:
        try:
            found |= {(asked[ref], pid): text for pid, text in ray.get(ref).items()}
        except TaskUnschedulableError:  # the node has gone meanwhile
            silent.append(asked[ref])
        except RayError as error:
            logger.warning("a node could not be asked about its processes: %s", str(error).splitlines()[0])
            silent.append(asked[ref])
    return found, [(node, pid) for node in silent for pid, _ in places[node]]


def look_here(processes: Sequence[Place]) -> dict[int, str]:
    """As `look`, at processes of this machine."""
    found = {}
    for pid, file in processes:
        try:
            process = _actor(pid)
            status = process.status()
            if status in FINDINGS:
                found[pid] = FINDINGS[status]
            if file is not None and _takes_signal(pid):
                with contextlib.suppress(OSError):
                    os.truncate(file, 0)
                process.send_signal(SIGNAL)
        except psutil.Error:
            found[pid] = GONE
    time.sleep(WRITING_S)
    return found


def _stopped_here(processes: Sequence[Place]) -> dict[int, str]:
    found = {}
    for pid, _ in processes:
        with contextlib.suppress(psutil.Error):
            status = _actor(pid).status()
            if status == psutil.STATUS_STOPPED:
                found[pid] = FINDINGS[status]
    return found


def _strike_here(processes: Sequence[Place], number: int) -> dict[int, str]:
    struck = {}
    for pid, _ in processes:
        with contextlib.suppress(psutil.Error):
            _actor(pid).send_signal(number)
            struck[pid] = "was struck"
    return struck


def _end_here(processes: Sequence[Place]) -> dict[int, str]:
    alive: dict[psutil.Process, int] = {}
    for pid, _ in processes:
        with contextlib.suppress(psutil.Error):
            actor = _actor(pid)
            alive |= dict.fromkeys([actor, *actor.children(recursive=True)], pid)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    _, left = psutil.wait_procs(alive, timeout=END_TIMEOUT_S)
    return {alive[process]: "did not end when it was killed" for process in left}


def _actor(pid: int) -> psutil.Process:
    """The process, where it is one of Ray's: its number may have been given to another one since."""
    process = psutil.Process(pid)
    if process.status() != psutil.STATUS_ZOMBIE and not "".join(process.cmdline()[:1]).startswith("ray::"):
        raise psutil.NoSuchProcess(pid)
    return process


def _takes_signal(pid: int) -> bool:
    """Whether the process has a handler for the signal; without one it would die of it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    caught = next((int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:")), 0)
    return bool(caught >> (SIGNAL - 1) & 1)


def by_node(placed: Sequence[tuple[str, Place]]) -> dict[str, list[Place]]:
    """Processes by their nodes."""
    nodes: dict[str, list[Place]] = defaultdict(list)
    for node, place in placed:
        nodes[node].append(place)
    return nodes
