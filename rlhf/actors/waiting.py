"""Waiting for remote calls: with a deadline, and with errors that name the worker, its node and the phase."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

import psutil
import ray
from ray.exceptions import RayError

from rlhf.actors import post_mortem
from rlhf.actors.calls import Call, Worker, failure_of, first_line, with_parts
from rlhf.errors import RlhfError, StallError, WorkerLostError

DEAD_PEER_GRACE_S = 3.0
"""How long to look for a dead worker after a first failure: when a collective loses a rank, the other ranks fail
before Ray reports the death."""
POLL_EVERY_S = 30.0
"""How often a wait checks that its workers can still finish; its deadline may be an hour away."""

Processes: TypeAlias = Mapping[str, Sequence[post_mortem.LocalProcess]]
"""Processes by their node's id in Ray."""


class CallObserver(Protocol):
    """Sees every wait of a driver for remote calls. Called from the threads that wait."""

    def wait_started(self, phase: str) -> None:
        """A wait begins, before its calls are submitted."""
        ...

    def workers_awaited(self, phase: str, workers: Sequence[Worker]) -> None:
        """These workers have not replied yet; nobody is awaited any longer if there are none. Called at the start of a
        wait, after each reply, and at its end."""
        ...

    def wait_succeeded(self, phase: str, seconds: Sequence[tuple[Worker, float]]) -> None:
        """All calls of a wait returned; `seconds` are from the start of the wait to each worker's result."""
        ...


class RemoteCalls:
    """The remote calls that the threads of a driver wait for, over one connection to Ray.

    Leaving Ray while a thread is inside a wait crashes the process, and a wait that begins later would start a new
    cluster. Therefore every wait of the driver goes through this object.
        `run` begins and ends a wait. Waits for: results.
        `stop` prevents new waits.
        `close` waits until current waits have ended, with a deadline. Unblocked by: the ends of the calls.
    """

    def __init__(self, observers: Sequence[CallObserver] = ()) -> None:
        self._observers = tuple(observers)
        self._num_waits = 0
        self._is_closed = False
        self._changed = threading.Condition()

    def run(
        self,
        submit: Callable[[], Sequence[Call]],
        *,
        phase: str,
        timeout_s: float,
        meanwhile: Callable[[], None] | None = None,
        peers: Sequence[Worker] = (),
    ) -> list[object]:
        """Submit calls and return their results, in order. `meanwhile` is called every `POLL_EVERY_S`; an error that it
        raises ends the wait. `peers` are workers that were not called and that the called ones wait for: if one of them
        is stopped or gone, the error names it.

        Raises:
            StallError: some calls had not returned after `timeout_s`, or their workers stay stopped; names these.
            WorkerLostError: a worker died, or `stop` was called before; names it.
            RlhfError: what a worker raised; errors of other classes are wrapped with worker and phase.
        """
        with self.waiting(phase):
            try:
                awaited = partial(self._tell_awaited, phase)
                results, seconds = _first_failure_raises(submit(), phase, timeout_s, meanwhile, awaited, peers)
            finally:
                self._tell_awaited(phase, [])
            for observer in self._observers:
                observer.wait_succeeded(phase, seconds)
        return results

    def wait_all(
        self, calls: Sequence[Call], *, phase: str, timeout_s: float, meanwhile: Callable[[], None] | None = None
    ) -> list[object]:
        """The results of submitted calls, in order. Raises: as `run`."""
        return self.run(lambda: calls, phase=phase, timeout_s=timeout_s, meanwhile=meanwhile)

    def tell_seconds(self, phase: str, seconds: Sequence[tuple[Worker, float]]) -> None:
        """Tell the observers how long workers took for work that several waits were for."""
        for observer in self._observers:
            observer.wait_succeeded(phase, seconds)

    @contextmanager
    def waiting(self, phase: str) -> Iterator[None]:
        """Count everything inside as one wait. Raises WorkerLostError after `stop`."""
        for observer in self._observers:
            observer.wait_started(phase)
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

    def _tell_awaited(self, phase: str, calls: Sequence[Call]) -> None:
        for observer in self._observers:
            observer.workers_awaited(phase, [call.worker for call in calls])

    def open(self) -> None:
        """Allow waits again after `stop`."""
        self._is_closed = False

    def stop(self) -> None:
        """Prevent new waits."""
        with self._changed:
            self._is_closed = True

    def close(self, timeout_s: float) -> bool:
        """Prevent new waits, and wait until current ones have ended. Returns whether all have ended."""
        self.stop()
        with self._changed:
            return self._changed.wait_for(lambda: not self._num_waits, timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitOutcome:
    """How a wait ended."""

    seconds: Sequence[tuple[Worker, float]]
    """The workers whose calls ended, and when, from the start of the wait."""
    failures: Sequence[RlhfError]
    """In the order of the calls."""
    pending: Sequence[Call]
    """Calls that had not ended."""


def wait(
    calls: Sequence[Call],
    *,
    phase: str,
    timeout_s: float,
    stop_at_failure: bool,
    check: Callable[[Sequence[Call]], None] | None = None,
    awaited: Callable[[Sequence[Call]], None] = lambda _: None,
) -> WaitOutcome:
    """Wait until all calls have ended, until the deadline, or until the first failure if `stop_at_failure`.

    `awaited` gets the calls under way at the start and after each reply. `check` gets them every `POLL_EVERY_S`; an
    error that it raises ends the wait.
    """
    start = time.monotonic()
    deadline = start + timeout_s
    pending = {call.ref: call for call in calls}
    seconds: list[tuple[Worker, float]] = []
    failures: dict[ray.ObjectRef[object], RlhfError] = {}
    awaited(calls)
    while pending and not (failures and stop_at_failure):
        left_s = max(0.0, deadline - time.monotonic())
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=min(left_s, POLL_EVERY_S))
        if not ready:
            if left_s <= POLL_EVERY_S:
                break
            if check is not None:
                check(list(pending.values()))
        for ref in ready:
            call = pending.pop(ref)
            seconds.append((call.worker, time.monotonic() - start))
            if (failure := failure_of(call, phase)) is not None:
                failures[ref] = failure
        if ready:
            awaited(list(pending.values()))
    return WaitOutcome(
        seconds=seconds,
        failures=[failures[call.ref] for call in calls if call.ref in failures],
        pending=list(pending.values()),
    )


def results_of(calls: Sequence[Call], phase: str) -> list[object]:
    """The results of calls that have succeeded. Raises WorkerLostError if a result was lost with its node."""
    try:
        results: list[object] = ray.get([call.ref for call in calls])
    except RayError as error:
        raise WorkerLostError(f"{phase}: {first_line(error)}") from error
    return results


def _first_failure_raises(
    calls: Sequence[Call],
    phase: str,
    timeout_s: float,
    meanwhile: Callable[[], None] | None,
    awaited: Callable[[Sequence[Call]], None],
    peers: Sequence[Worker],
) -> tuple[list[object], Sequence[tuple[Worker, float]]]:
    """Results and times of the calls. Raises: as `RemoteCalls.run`."""
    stopped = StoppedWorkers(phase, peers, find_stopped=post_mortem.find_stopped, examine=post_mortem.examine)

    def check(pending: Sequence[Call]) -> None:
        if meanwhile is not None:
            meanwhile()
        stopped.check([call.worker for call in pending])

    outcome = wait(calls, phase=phase, timeout_s=timeout_s, stop_at_failure=True, check=check, awaited=awaited)
    if outcome.failures:
        raise root_cause(outcome.failures, outcome.pending, phase, peers)
    if outcome.pending:
        late = [call.worker for call in outcome.pending]
        findings = post_mortem.examine(processes_by_node(late))
        stall = StallError(f"{phase}: no reply after {timeout_s:g} s from {describe_late(late, findings)}")
        raise blame_peers(stall, peers, phase) or stall
    return results_of(calls, phase), outcome.seconds


class StoppedWorkers:
    """Ends a wait whose workers are stopped. A process that is stopped in one check may go on, so it counts only if it
    is still stopped in the next one.

    `find_stopped` and `examine` are those of `post_mortem`.
    """

    def __init__(
        self,
        phase: str,
        peers: Sequence[Worker],
        *,
        find_stopped: Callable[[Processes], set[post_mortem.Process]],
        examine: Callable[[Processes], Mapping[post_mortem.Process, str]],
    ) -> None:
        self._phase = phase
        self._peers = peers
        self._find_stopped = find_stopped
        self._examine = examine
        self._before: set[post_mortem.Process] = set()

    def check(self, pending: Sequence[Worker]) -> None:
        """Raises StallError that names those of the pending workers and their peers that were stopped in the last check
        and are in this one."""
        late = with_parts([*self._peers, *pending])
        before, self._before = self._before, self._find_stopped(processes_by_node(late))
        if still_stopped := before & self._before:
            findings = self._examine(processes_by_node(late))
            workers = [worker for worker in late if (worker.node_id, worker.pid) in still_stopped]
            raise StallError(f"{self._phase}: no reply can come from {describe_late(workers, findings)}")


def blame_peers(error: RlhfError, peers: Sequence[Worker], phase: str) -> StallError | None:
    """An error that names the peers that are stopped or gone; None if there are none, or if `error` names them."""
    found = post_mortem.examine(processes_by_node(peers)) if peers else {}
    passing = post_mortem.FINDINGS[psutil.STATUS_DISK_SLEEP]
    findings = {process: text for process, text in found.items() if text != passing}
    workers = [worker for worker in with_parts(peers) if (worker.node_id, worker.pid) in findings]
    if all(str(worker) in str(error) for worker in workers):
        return None
    stall = StallError(f"{phase}: no reply can come from {describe_late(workers, findings)} Meanwhile {error}")
    stall.__cause__ = error
    return stall


def root_cause(
    failures: Sequence[RlhfError], pending: Sequence[Call], phase: str, peers: Sequence[Worker]
) -> RlhfError:
    """The failure to report. A dead worker explains the failed collectives of the others, a peer that is stopped or
    gone explains those of all, and an error of this package says more than a wrapped one."""
    found = list(failures)
    if pending:
        ready, late = ray.wait([call.ref for call in pending], num_returns=len(pending), timeout=DEAD_PEER_GRACE_S)
        found += [error for call in pending if call.ref in ready and (error := failure_of(call, phase)) is not None]
        if late and all(type(error) is RlhfError for error in found):
            # A collective fails when a peer is stopped. A worker that only waits for its peers is not the cause.
            workers = [call.worker for call in pending if call.ref in late]
            if findings := post_mortem.examine(processes_by_node(workers)):
                stall = StallError(f"{phase}: no reply from {describe_late(workers, findings)} Meanwhile {found[0]}")
                stall.__cause__ = found[0]
                found.append(stall)
    cause = min(found, key=lambda error: (not isinstance(error, WorkerLostError), type(error) is RlhfError))
    return cause if isinstance(cause, WorkerLostError) else blame_peers(cause, peers, phase) or cause


def describe_late(late: Sequence[Worker], findings: Mapping[post_mortem.Process, str]) -> str:
    """Which workers are late, what their nodes found wrong with them, and where their stacks are."""
    text = f"{', '.join(map(str, late))}."
    for worker in dict.fromkeys(with_parts(late)):
        if finding := findings.get((worker.node_id, worker.pid)):
            text += f" {worker.name} {finding}."
    folders = {worker.stacks.parent for worker in late if worker.stacks is not None}
    return text + "".join(f" Their stacks: {folder}/*{post_mortem.SUFFIX}." for folder in sorted(folders))


def processes_by_node(workers: Sequence[Worker]) -> dict[str, list[post_mortem.LocalProcess]]:
    """The processes of workers and their parts for `post_mortem`, without those whose process is not known yet."""
    known = [worker for worker in with_parts(workers) if worker.pid]
    return post_mortem.by_node([(worker.node_id, (worker.pid, worker.stacks)) for worker in known])
