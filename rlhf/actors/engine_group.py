"""The rollout engines of a run, each of which can be lost and started again alone."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from rlhf.actors.calls import Call, Worker, failure_of
from rlhf.actors.groups import Submit, WorkerGroup
from rlhf.actors.waiting import RemoteCalls, wait
from rlhf.errors import INFRASTRUCTURE, RlhfError, StallError

HEALTH_CHECK = "rollout health check"
REPLY_TIMEOUT_S = 10.0

End = Callable[[Sequence[Worker]], None]
"""Ends workers, and returns when their processes are gone."""
Start = Callable[[Worker, RlhfError], Worker]
"""Takes an engine that is gone and why; returns a new one in its place, loaded."""
Connect = Callable[[Sequence[Worker]], None]
"""Has the policy send its weights to these engines, and to no others, from now on."""


class EngineGroup(WorkerGroup):
    """Rollout engines. They do not compute together: when one is lost, a new one takes its place while the others go
    on. A new engine has the weights of the model's files, so it must serve nobody before it was sent the live ones.

    `workers` are the engines that are loaded and not known to be lost, in the order of their devices. Thread-safe: a
    lost engine is started again by the first thread that asks for that, and others that ask for the same wait.
    """

    def __init__(
        self, workers: Sequence[Worker], calls: RemoteCalls, *, end: End, start: Start, connect: Connect
    ) -> None:
        """The policy sends its weights to `workers` already."""
        super().__init__(workers, calls)
        self._end = end
        self._start = start
        self._connect = connect
        self._connected = self.workers
        self._is_closed = False
        self._changing = threading.Lock()
        self._places = {worker.name: threading.RLock() for worker in workers}
        """By the name of the engine there. Held while an engine is ended or started."""
        self._losses: dict[Worker, RlhfError] = {}
        self._successors: dict[Worker, Worker] = {}

    def run(self, submit: Submit, *, phase: str, timeout_s: float, peers: Sequence[Worker] = ()) -> list[object]:
        """The results of the engines that are not lost. Raises: as `WorkerGroup.run`."""
        called = self.workers
        try:
            return self._run(called, submit, phase, timeout_s, peers)
        except INFRASTRUCTURE:
            alive = self.alive(timeout_s)
            if alive == called:
                raise
        return self._run(alive, submit, phase, timeout_s, peers)

    def alive(self, timeout_s: float) -> tuple[Worker, ...]:
        """The engines that reply within `timeout_s`. The others are lost (`lose`)."""
        workers = self.workers
        for worker, error in self._silent(workers, timeout_s):
            self.lose(worker, error)
        return tuple(worker for worker in workers if worker in self.workers)

    def some_alive(self, timeout_s: float) -> tuple[Worker, ...]:
        """As `alive`; where none is, all are started again. Raises: as `start_again`."""
        if alive := self.alive(timeout_s):
            return alive
        lost = [worker for worker in self._losses if worker not in self._successors]
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda worker: self.start_again(worker, self._losses[worker]), lost))
        return self.workers

    def lose(self, worker: Worker, error: RlhfError) -> None:
        """End an engine that `error` reported as lost, so that it serves no weights that the others do not have."""
        with self._places[worker.name]:
            if worker not in self.workers:
                return
            with self._changing:
                self.workers = tuple(other for other in self.workers if other != worker)
            self._losses[worker] = error
            self._end([worker])

    def start_again(self, lost: Worker, error: RlhfError) -> Worker:
        """The engine in the place of one that `error` reported as lost: a new one for the first who asks. Raises: why
        none could start."""
        with self._places[lost.name]:
            if self._is_closed:
                raise error
            self.lose(lost, error)
            if lost not in self._successors:
                started = self._started(lost, self._losses[lost])
                places = list(self._places)
                with self._changing:
                    engines = [*self.workers, started]
                    self.workers = tuple(sorted(engines, key=lambda engine: places.index(engine.name)))
                self._successors[lost] = started
            return self._successors[lost]

    def close(self) -> None:
        """Start no engine again: the attempt is over, and its places belong to the next one."""
        self._is_closed = True

    def connect(self, workers: Sequence[Worker]) -> None:
        """Have the policy send its weights to these engines. Where it sent them to others, a new process group is
        formed: of the policy's first rank and these."""
        if self._connected != tuple(workers):
            self._connected = ()
            self._connect(workers)
            self._connected = tuple(workers)

    def _silent(self, workers: Sequence[Worker], timeout_s: float) -> list[tuple[Worker, RlhfError]]:
        """The engines that do not reply, and why. Where the first wait ends early, as it does for a process that is
        gone or stopped, the others have a moment to reply."""
        try:
            self._run(workers, lambda _rank, handle: handle.location.remote(), HEALTH_CHECK, timeout_s, ())
        except INFRASTRUCTURE as error:
            first = error
        else:
            return []
        with self._calls.waiting(HEALTH_CHECK):
            calls = [Call(worker=worker, ref=worker.handle.location.remote()) for worker in workers]
            outcome = wait(calls, phase=HEALTH_CHECK, timeout_s=REPLY_TIMEOUT_S, stop_at_failure=False)
            late = [call.worker for call in outcome.pending]
            failures = [(call.worker, failure_of(call, HEALTH_CHECK)) for call in calls if call.worker not in late]
        found = [(worker, failure) for worker, failure in failures if failure is not None]
        return [*found, *((worker, StallError(f"{HEALTH_CHECK}: no reply from {worker}. {first}")) for worker in late)]

    def _started(self, lost: Worker, error: RlhfError) -> Worker:
        try:
            return self._start(lost, error)
        except INFRASTRUCTURE as worse:
            raise worse if worse is error else type(worse)(f"{error} It could not be replaced: {worse}") from error
