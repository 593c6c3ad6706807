"""Waiting for remote calls: with a deadline, and with errors that name who failed, where and doing what."""

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import ray
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    RayActorError,
    RayError,
    RayTaskError,
)

from rlhf.actors import post_mortem
from rlhf.errors import RlhfError, StallError, WorkerLostError

Result = TypeVar("Result")

BLAME_GRACE_S = 3.0
"""After a first failure, how long to look for a dead peer: a collective that lost one fails on the others first."""
LOOK_EVERY_S = 30.0
"""How often a wait asks whether it is still worth waiting; its deadline may be an hour away."""

EXIT = re.compile(r"Worker exit type: (?P<kind>\w+) Worker exit detail: (?P<detail>.+)")
"""In what Ray says of an actor that died."""
SPARE_MEMORY = "Where memory is the cause: offload, share fewer roles, or lower train.max_tokens_per_micro_batch."
NO_ROOM = (ObjectStoreFullError, OutOfDiskError, ObjectLostError)
"""What Ray raises in a worker for whose answer, or for what it was given, there is no room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A remote actor and the name that errors call it by."""

    handle: "ray.actor.ActorHandle"
    name: str
    """Role and rank, e.g. `policy rank 1`."""
    node: str
    """The node's address."""
    node_id: str
    """The node's name in Ray: one address may have several."""
    pid: int
    stacks: Path | None = None
    """The file for its stacks, where it has one."""

    def __str__(self) -> str:
        return f"{self.name} (node {self.node}, pid {self.pid})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A remote call under way."""

    worker: Worker
    ref: "ray.ObjectRef[object]"


class Traffic:
    """The waits of this process's threads for remote calls.

    To leave Ray while a thread is inside a wait crashes the process, and a wait that comes later would start a cluster
    of its own.
        `waiting` produces and takes back a wait. Waits for: nothing.
        `stop` lets no more begin.
        `close` consumes waits. Waits for: the end of those under way, with a deadline. Unblocked by: the calls' ends.
    """

    def __init__(self) -> None:
        self._num_waits = 0
        self._is_closed = False
        self._changed = threading.Condition()
        self.watch: Callable[[str], None] = lambda _phase: None
        """Called with the phase of every wait that begins."""
        self.clock: Callable[[str, Sequence[tuple[Worker, float]]], None] = lambda _phase, _seconds: None
        """Called with the phase of every wait that ended well, and the seconds after which each worker had answered."""

    @contextmanager
    def waiting(self, phase: str) -> Iterator[None]:
        """Be inside a wait; also while what is waited for is asked for. Raises WorkerLostError after `close`."""
        self.watch(phase)
        with self._changed:
            if self._is_closed:
                raise WorkerLostError(f"{phase}: the run has left the cluster")
            self._num_waits += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_waits -= 1
                self._changed.notify_all()

    def open(self) -> None:
        """Let waits begin."""
        self._is_closed = False

    def stop(self) -> None:
        """Let no more waits begin."""
        with self._changed:
            self._is_closed = True

    def close(self, timeout_s: float) -> bool:
        """Let no more waits begin, and wait for the end of those under way. Returns whether all have ended."""
        self.stop()
        with self._changed:
            return self._changed.wait_for(lambda: not self._num_waits, timeout_s)


traffic = Traffic()
"""That of this process, as its connection to Ray is."""


def wait_all(
    calls: Sequence[Call], *, phase: str, timeout_s: float, meanwhile: Callable[[], None] | None = None
) -> list[object]:
    """The results of `calls`, in order. `meanwhile` is called now and then; what it raises ends the wait.

    Raises:
        StallError: some had not answered after `timeout_s`, or are stopped and stay so; names them.
        WorkerLostError: a worker died; names it.
        RlhfError: what the worker itself raised, where it is one of ours; anything else is wrapped with its origin.
    """
    with traffic.waiting(phase):
        return answers(calls, phase=phase, timeout_s=timeout_s, meanwhile=meanwhile)


def answers(
    calls: Sequence[Call], *, phase: str, timeout_s: float, meanwhile: Callable[[], None] | None = None
) -> list[object]:
    """As `wait_all`, for who is inside `traffic.waiting` already."""
    start = time.monotonic()
    deadline = start + timeout_s
    pending = {call.ref: call for call in calls}
    seconds: list[tuple[Worker, float]] = []
    failures: list[RlhfError] = []
    stopped: set[post_mortem.Process] = set()
    while pending and not failures:
        left_s = max(0.0, deadline - time.monotonic())
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=min(left_s, LOOK_EVERY_S))
        if not ready:
            late = [call.worker for call in pending.values()]
            if left_s <= LOOK_EVERY_S:
                findings = post_mortem.look(places(late))
                raise StallError(f"{phase}: no answer after {timeout_s:g} s from {told(late, findings)}")
            if meanwhile is not None:
                meanwhile()
            before, stopped = stopped, post_mortem.stopped(places(late))
            if stay := before & stopped:
                findings = post_mortem.look(places(late))
                halted = [worker for worker in late if (worker.node_id, worker.pid) in stay]
                raise StallError(f"{phase}: no answer can come from {told(halted, findings)}")
        seconds += [(pending[ref].worker, time.monotonic() - start) for ref in ready]
        failures += [error for ref in ready if (error := failure_of(pending.pop(ref), phase)) is not None]
    if failures:
        raise blame(failures, list(pending.values()), phase)
    try:
        results: list[object] = ray.get([call.ref for call in calls])
    except RayError as error:  # an answer was there a moment ago, and has gone with its node
        raise WorkerLostError(f"{phase}: {first_line(error)}") from error
    traffic.clock(phase, seconds)
    return results


def wait_one(call: Call, result_type: type[Result], *, phase: str, timeout_s: float) -> Result:
    """The result of one call, as `wait_all`."""
    (result,) = wait_all([call], phase=phase, timeout_s=timeout_s)
    assert isinstance(result, result_type), (phase, type(result))
    return result


def failure_of(call: Call, phase: str) -> RlhfError | None:
    """What a finished call raised, as one of our errors; None where it succeeded."""
    try:
        ray.get(call.ref, timeout=60.0)
    except RayActorError as error:
        return WorkerLostError(f"{phase}: {call.worker} died. {how_it_ended(error)}")
    except RayTaskError as error:
        return raised_there(call.worker, phase, error)
    except GetTimeoutError:
        return StallError(f"{phase}: the answer of {call.worker} did not arrive.")
    except RayError as error:
        return WorkerLostError(f"{phase}: {call.worker}: {first_line(error)}")
    return None


def raised_there(worker: Worker, phase: str, error: RayTaskError) -> RlhfError:
    """What a call of a worker raised, as one of our errors."""
    cause = error.cause
    if isinstance(cause, RlhfError):
        return cause
    text = f"{type(cause).__name__}: {first_line(cause)}"
    is_lost = isinstance(cause, NO_ROOM)
    found = WorkerLostError(f"{phase}: {worker}: {text}") if is_lost else RlhfError(f"{phase}: {worker} failed: {text}")
    found.__cause__ = error  # whose text is the traceback over there
    return found


def blame(failures: Sequence[RlhfError], pending: Sequence[Call], phase: str) -> RlhfError:
    """The failure to report: a death explains a failed collective, and one of ours explains more than a wrapped one."""
    found = list(failures)
    if pending:
        ready, late = ray.wait([call.ref for call in pending], num_returns=len(pending), timeout=BLAME_GRACE_S)
        found += [error for call in pending if call.ref in ready and (error := failure_of(call, phase)) is not None]
        if late and all(type(error) is RlhfError for error in found):
            # A collective gives up a peer that is stopped; one that only waits for its mates is not to blame.
            workers = [call.worker for call in pending if call.ref in late]
            findings = post_mortem.look(places(workers))
            if findings:
                stall = StallError(f"{phase}: no answer from {told(workers, findings)} Meanwhile {found[0]}")
                stall.__cause__ = found[0]
                found.append(stall)
    return min(found, key=lambda error: (not isinstance(error, WorkerLostError), type(error) is RlhfError))


def told(late: Sequence[Worker], findings: Mapping[post_mortem.Process, str]) -> str:
    """Who is late, what their nodes found wrong with them, and where their stacks are."""
    text = f"{', '.join(map(str, late))}."
    for worker in late:
        if finding := findings.get((worker.node_id, worker.pid)):
            text += f" {worker.name} {finding}."
    folders = {worker.stacks.parent for worker in late if worker.stacks is not None}
    return text + "".join(f" Their stacks: {folder}/*{post_mortem.SUFFIX}." for folder in sorted(folders))


def places(workers: Sequence[Worker]) -> dict[str, list[post_mortem.Place]]:
    """Where workers are, for `post_mortem`; those that have not said so yet are left out."""
    seated = [worker for worker in workers if worker.pid]
    return post_mortem.by_node([(worker.node_id, (worker.pid, worker.stacks)) for worker in seated])


def how_it_ended(error: RayActorError) -> str:
    """What Ray knows of the end of a process, in a sentence or two."""
    found = EXIT.search(str(error))
    if found is None:
        return first_line(error)
    if found["kind"] == "NODE_OUT_OF_MEMORY":
        return f"Ray ended it, since its node ran out of memory. {SPARE_MEMORY}"
    if found["kind"] == "SYSTEM_ERROR":
        return f"It was killed, as the kernel does where memory is short (dmesg tells), or it crashed. {SPARE_MEMORY}"
    return f"{found['detail'].partition('. ')[0].rstrip('.')}."


def first_line(error: Exception) -> str:
    """The first line that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
