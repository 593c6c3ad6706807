"""Workers that run tools and environments on any node, and the sessions that the driver has with them."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from rlhf.actors.actor import Actor
from rlhf.actors.calls import Call, Worker, cause_of_death, error_in_worker, first_line
from rlhf.actors.cluster import Cluster
from rlhf.environments.session import EnvironmentFaultError, LocalSession, LocalSessions, Reply
from rlhf.environments.spec import WorldSpec
from rlhf.errors import RlhfError, StallError, WorkerLostError
from rlhf.stopwatch import Stopwatch
from rlhf.types import Json

PHASE = "environments"
FUNCTION_TRIES = 2
CONCURRENT_CALLS = 20_000
"""Calls of a worker that are under way at the same time; there is no thread for each."""
PING_EVERY_S = 10.0
PING_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 10.0

StartAgain = Callable[[Worker, RlhfError], Worker]
"""Takes a worker that is lost and why. Returns a new one in its place; raises RlhfError where there can be none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentsSpec:
    """What the workers of tools and environments load."""

    world: WorldSpec
    num_workers: int
    num_processes: int
    """Child processes of each worker."""
    timeout_s: float
    """Longest time for one call of the user's code."""


class EnvironmentWorker(Actor):
    """Tools and environments of many episodes on one event loop. The user's code runs in child processes."""

    _sessions: LocalSessions

    async def start(self, spec: EnvironmentsSpec) -> None:
        """Load the user's code. Raises ConfigError if that fails on this node."""
        self._opened: dict[str, tuple[LocalSession, asyncio.Lock]] = {}
        self._sessions = LocalSessions(spec.world, num_processes=spec.num_processes, timeout_s=spec.timeout_s)
        await self._sessions.start()

    async def ask(self, name: str, alone: bool, operation: str, arguments: Sequence[Json]) -> tuple[object, str]:
        """Call a method of the session called `name`, after what it was asked before. Returns its result and, of an
        environment that cannot go on, why."""
        if name not in self._opened:
            self._opened[name] = (self._sessions.session(name, alone=alone), asyncio.Lock())
        session, turn = self._opened[name]
        try:
            async with turn:  # the driver may ask for the end of what it does not wait for any more
                return await getattr(session, operation)(*arguments), ""
        except EnvironmentFaultError as error:
            return None, str(error)
        finally:
            if operation == "close":
                self._opened.pop(name, None)

    async def call_function(self, name: str, function: str, arguments: Json) -> Reply:
        """Call a tool that is a function, in the session called `name`."""
        return await self._sessions.session(name, alone=False).call_function(function, arguments)

    async def ping(self) -> None:
        """Reply, which shows that the event loop runs."""

    async def close(self) -> None:
        """End the child processes."""
        await self._sessions.close()


class _Load:
    """What a place had to do since it was last asked. Counted on the loop's thread, read on the driver's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy = Stopwatch()
        self._num_calls = self._num_episodes = self._num_restarts = 0

    @contextmanager
    def calling(self) -> Iterator[None]:
        """A call is under way."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def begun(self) -> None:
        """An episode has begun here."""
        with self._lock:
            self._num_episodes += 1

    def restarted(self) -> None:
        """The worker is lost, and another one takes its place."""
        with self._lock:
            self._num_restarts += 1

    def take(self) -> tuple[float, int, int]:
        """Seconds with a call under way, episodes that began and workers that were lost since the last call."""
        with self._lock:
            taken = self._busy.take(), self._num_episodes, self._num_restarts
            self._num_episodes = self._num_restarts = 0
            return taken

    def _count(self, change: int) -> None:
        with self._lock:
            self._num_calls += change
            self._busy.run(self._num_calls > 0)


class _Place:
    """One worker, and those that take its place. Its tasks end with `close`.

    `_watch` waits for replies to pings: one that does not come in time, as from a process that is stopped or a node
    that is cut off, makes the worker a lost one. `_restart` waits for a new worker.
    """

    def __init__(self, worker: Worker, start_again: StartAgain) -> None:
        self.num_users = 0
        self.failure: RlhfError | None = None
        """Why no new worker could start."""
        self.worker: Worker | None = worker
        self.load = _Load()
        self._start_again = start_again
        self._restarting: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    async def live(self) -> Worker:
        """The worker, once it runs. Raises RlhfError where none could start."""
        if self.worker is None and self._restarting is not None:
            await asyncio.shield(self._restarting)
        if self.worker is None:
            assert self.failure is not None, "a restart ends with a worker or a failure"
            raise self.failure
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        return self.worker

    def lose(self, worker: Worker, error: RlhfError) -> None:
        """Start a new worker in the place of one that is lost."""
        if self.worker is worker:
            self.worker = None
            self.load.restarted()
            self._restarting = asyncio.create_task(self._restart(worker, error))

    async def result(self, worker: Worker, ref: "ray.ObjectRef[object]") -> object:
        """The result of a call of the worker. Raises EnvironmentFaultError where the worker is lost."""
        with self.load.calling():
            try:
                return await ref
            except RayTaskError as error:
                raise _failure(worker, error) from error
            except RayError as error:
                failure = _failure(worker, error)
                self.lose(worker, failure)
                raise EnvironmentFaultError(str(failure)) from error

    async def close(self) -> None:
        for task in (self._watching, self._restarting):
            if task is not None:
                task.cancel()
        if self.worker is not None:
            with suppress(RayError, TimeoutError):
                await asyncio.wait_for(self.worker.handle.close.remote(), CLOSE_TIMEOUT_S)

    async def _restart(self, lost: Worker, error: RlhfError) -> None:
        loop = asyncio.get_running_loop()
        try:
            self.worker = await loop.run_in_executor(None, self._start_again, lost, error)
        except RlhfError as worse:
            self.failure = worse

    async def _watch(self) -> None:
        while self.failure is None:
            await asyncio.sleep(PING_EVERY_S)
            worker = self.worker
            if worker is None:
                continue
            try:
                await asyncio.wait_for(worker.handle.ping.remote(), PING_TIMEOUT_S)
            except TimeoutError:
                self.lose(worker, StallError(f"{PHASE}: {worker} did not reply for {PING_TIMEOUT_S:g} s."))
            except RayError as error:
                self.lose(worker, _failure(worker, error))


class WorkerSessions:
    """Implements `Sessions` by workers. A session stays with the worker that has the fewest when it begins. What was
    with a lost worker ends with EnvironmentFaultError; a new worker takes its place, and others go on meanwhile."""

    def __init__(self, workers: Sequence[Worker], start_again: StartAgain) -> None:
        self._places = [_Place(worker, start_again) for worker in workers]
        self._read_at = time.monotonic()

    def session(self, name: str, *, alone: bool) -> "WorkerSession":
        return WorkerSession(self, name, alone=alone)

    def place(self) -> _Place:
        """Where to begin a session: at a worker that runs, if there is one. Raises RlhfError where none can run."""
        possible = [place for place in self._places if place.failure is None]
        if not possible:
            assert self._places[0].failure is not None, "none is possible"
            raise self._places[0].failure
        return min(possible, key=lambda place: (place.worker is None, place.num_users))

    def usage(self) -> Mapping[str, float]:
        """How the workers were used since the last call: the share of the time in which they had a call under way, the
        mean over them and the highest; the episodes that began at each, the same; and how many were lost."""
        now = time.monotonic()
        total_s, self._read_at = max(now - self._read_at, 1e-9), now
        busy, episodes, restarts = zip(*(place.load.take() for place in self._places), strict=True)
        return {
            "agent/worker_busy_share": sum(busy) / len(busy) / total_s,
            "agent/worker_busy_share_max": max(busy) / total_s,
            "agent/worker_episodes": sum(episodes) / len(episodes),
            "agent/worker_episodes_max": float(max(episodes)),
            "agent/worker_restarts": float(sum(restarts)),
        }

    async def close(self) -> None:
        await asyncio.gather(*(place.close() for place in self._places))


class WorkerSession:
    """Implements `Session` by a worker."""

    def __init__(self, sessions: WorkerSessions, name: str, *, alone: bool) -> None:
        self._sessions = sessions
        self._name = name
        self._alone = alone
        self._place: _Place | None = None
        self._worker: Worker | None = None
        """Where the environment lives."""

    async def open(self, row: Mapping[str, Json]) -> str | None:
        self._place = self._sessions.place()
        self._place.num_users += 1
        self._place.load.begun()
        self._worker = await self._place.live()
        return cast(str | None, await self._ask("open", dict(row)))

    async def step(self, text: str) -> Reply:
        return cast(Reply, await self._ask("step", text))

    async def reward(self) -> float:
        return cast(float, await self._ask("reward"))

    async def call_method(self, name: str, arguments: Json) -> Reply:
        return cast(Reply, await self._ask("call_method", name, arguments))

    async def call_function(self, name: str, arguments: Json) -> Reply:
        """As `Session.call_function`. A worker that is lost is one more process that ended."""
        for _ in range(FUNCTION_TRIES):
            place = self._sessions.place()
            place.num_users += 1
            try:
                worker = await place.live()
                return cast(
                    Reply, await place.result(worker, worker.handle.call_function.remote(self._name, name, arguments))
                )
            except EnvironmentFaultError as error:
                failed = Reply(text=f"error: {error}", failed=True)
            finally:
                place.num_users -= 1
        return failed

    async def close(self) -> None:
        place, self._place = self._place, None
        if place is None:
            return
        try:
            if self._worker is not None:
                with suppress(EnvironmentFaultError):
                    await place.result(self._worker, self._submit("close"))
        finally:
            place.num_users -= 1

    def _submit(self, operation: str, *arguments: Json) -> "ray.ObjectRef[object]":
        assert self._worker is not None, "opened"
        ref: ray.ObjectRef[object] = self._worker.handle.ask.remote(self._name, self._alone, operation, arguments)
        return ref

    async def _ask(self, operation: str, *arguments: Json) -> object:
        """The result of a method of the session in its worker. Raises EnvironmentFaultError."""
        assert self._place is not None, "opened"
        assert self._worker is not None, "opened"
        try:
            result, fault = cast(
                tuple[object, str], await self._place.result(self._worker, self._submit(operation, *arguments))
            )
        except EnvironmentFaultError as error:
            raise EnvironmentFaultError(f"{operation}(): {error}") from error
        if fault:
            raise EnvironmentFaultError(fault)
        return result


def open_workers(
    cluster: Cluster,
    spec: EnvironmentsSpec,
    *,
    timeout_s: float,
    on_replaced: Callable[[str], None] | None,
    env: Mapping[str, str] = MappingProxyType({}),
) -> WorkerSessions:
    """Start workers on the nodes of a cluster in turn, with the variables `env`, and load the user's code. A worker
    that is lost is replaced, on another node if its own is gone, and `on_replaced` gets a message; with None there is
    no other in its place.

    Raises:
        ConfigError: the user's code cannot be loaded on a node.
        StallError: that took longer than `timeout_s`.
    """

    names = [f"environment worker {place}" for place in range(spec.num_workers)]

    def begin(name: str, nodes: Sequence[str]) -> Call:
        return cluster.start_worker(
            EnvironmentWorker,
            None,
            name=name,
            title="Environment",
            env=env,
            max_concurrency=CONCURRENT_CALLS,
            node=nodes[names.index(name) % len(nodes)] if nodes else None,
        )

    def start(wanted: Sequence[str]) -> list[Worker]:
        nodes = cluster.cpu_nodes
        workers = cluster.wait_started([begin(name, nodes) for name in wanted])
        calls = [Call(worker=worker, ref=worker.handle.start.remote(spec)) for worker in workers]
        cluster.calls.wait_all(calls, phase="loading of tools and environments", timeout_s=timeout_s)
        return workers

    def start_again(lost: Worker, error: RlhfError) -> Worker:
        if on_replaced is None:
            raise error
        # One wait for all of it: the driver neither leaves Ray halfway nor begins after leaving.
        with cluster.calls.waiting("replacement of a lost process"):
            cluster.kill([lost])
            (worker,) = start([lost.name])
        on_replaced(f"{error} Replaced by {worker}; what it ran begins anew")
        return worker

    return WorkerSessions(start(names), start_again)


def _failure(worker: Worker, error: RayError) -> RlhfError:
    """What a call's error says of its worker."""
    if isinstance(error, RayTaskError):
        return error_in_worker(worker, PHASE, error)
    cause = cause_of_death(error) if isinstance(error, RayActorError) else first_line(error)
    return WorkerLostError(f"{PHASE}: {worker} died. {cause}")
