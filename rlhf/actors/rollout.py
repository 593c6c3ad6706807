"""The pool of rollout engines: which engine serves which request, and what happens to requests of a lost engine."""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import cast
from uuid import uuid4

from ray.exceptions import RayError

from rlhf.actors.calls import Call, Worker, first_line
from rlhf.actors.groups import Submit, WorkerGroup
from rlhf.engines.rollout.loads import Load, least_loaded
from rlhf.errors import INFRASTRUCTURE, RlhfError, WorkerLostError
from rlhf.stopwatch import Stopwatch
from rlhf.types import FloatArray, PackedTokens, Rollout, RolloutRequest

PHASE = "rollout generation"

Introduce = Callable[[Worker], "Future[None]"]
"""Has a new engine serve the live weights; the future ends when it does."""


def serves_already(_engine: Worker) -> "Future[None]":
    """For engines that need no weights."""
    served: Future[None] = Future()
    served.set_result(None)
    return served


@dataclass(slots=True)
class _Asked:
    """A request whose response is not complete."""

    request: RolloutRequest
    future: "Future[Rollout]" = field(default_factory=Future)
    call: int = 0
    """Requests of one call of an engine have the same number."""
    is_repeated: bool = False

    @property
    def tokens(self) -> int:
        """The most tokens that it may take."""
        return len(self.request.prompt_token_ids) + self.request.sampling.max_tokens


@dataclass(slots=True, eq=False)
class _Engine:
    """One engine, and what it was asked for."""

    worker: Worker
    asked: dict[str, _Asked] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    """Calls that submitted or aborted requests, and have not been waited for."""
    load: Load = field(default_factory=Load)
    is_served: bool = False
    """Whether a thread collects its responses."""
    busy: Stopwatch = field(default_factory=Stopwatch)
    """Runs while it has requests."""
    failure: RlhfError | None = None


class RolloutPool:
    """Engines that act as one `RolloutEngine`. Thread-safe.

    A request goes to the engine with the fewest tokens outstanding, together with the others for the same prompt, which
    share its KV cache. No engine gets more than it can decode at once and a few to go on with: the others wait here for
    whichever engine has room first. A request's seed decides its tokens, so it does not matter which engine that is.

    One thread an engine, while that has requests.
        consumes: the engine's responses. Produces: the ends of futures, and further requests to engines with room.
        Waits for: a response, `generate_timeout_s`. Unblocked by: a response, or the loss of the engine.
    Where an engine is lost, the others get its requests, once more. Its thread has a new one started in its place,
    which gets requests as soon as it serves the live weights. An error that is no loss ends all futures.

    Without continuous batching (`slots` None) an engine computes the requests of a call together, which rounds their
    log-probs in a way of their own. There a lost engine's calls are made again as they were, and nothing is asked
    before the new one is there, so that a loss changes no bit.
    """

    def __init__(
        self,
        group: WorkerGroup,
        *,
        generate_timeout_s: float,
        control_timeout_s: float,
        introduce: Introduce = serves_already,
        colocated: Sequence[WorkerGroup] = (),
        colocated_timeout_s: float = 0.0,
        slots: int | None = None,
        phase: str = PHASE,
    ) -> None:
        """`introduce` gets engines that take the place of lost ones. `colocated` are the models on the same devices;
        they release unused memory before the engines wake, which waits for what they are doing: `colocated_timeout_s`
        is the longest that one of their calls may take. An engine gets at most `slots` requests at a time; None: no
        limit, and no continuous batching. `phase` is what errors call the generation."""
        self._group = group
        self._colocated = colocated
        self._colocated_timeout_s = colocated_timeout_s
        self._generate_timeout_s = generate_timeout_s
        self._control_timeout_s = control_timeout_s
        self._slots = slots
        self._introduce = introduce
        self._phase = phase
        self._name = uuid4().hex
        self._lock = threading.Lock()
        self._is_settled = threading.Condition(self._lock)
        self._queue: deque[list[_Asked]] = deque()
        """Requests that no engine has, those that are asked together in a list."""
        self._engines = [_Engine(worker) for worker in group.workers]
        """Those that get requests."""
        self._num_calls = 0
        self._num_replacing = 0
        """Lost engines that nobody has replaced yet."""
        self._failure: RlhfError | None = None
        """Why one could not be replaced."""
        self._seconds: list[tuple[Worker, float]] = []
        """How long engines took that are done, while others are not."""
        self._busy = Stopwatch()
        """Runs while any engine has requests."""
        self._read_at = time.monotonic()

    def submit(self, requests: Sequence[RolloutRequest]) -> list["Future[Rollout]"]:
        """See `RolloutEngine.submit`. Raises RlhfError for the id of a request that is under way."""
        asked = [_Asked(request) for request in requests]
        with self._lock:
            self._require_new(requests)
            self._queue.extend(_by_prompt(asked))
            self._send()
        if self._failure is not None:
            self._fail(self._failure)
        return [one.future for one in asked]

    def abort(self, request_ids: Collection[str]) -> None:
        """See `RolloutEngine.abort`."""
        unwanted = set(request_ids)
        aborted: list[_Asked] = []
        with self._lock:
            waiting, self._queue = self._queue, deque()
            for group in waiting:
                aborted += [one for one in group if one.request.id in unwanted]
                if kept := [one for one in group if one.request.id not in unwanted]:
                    self._queue.append(kept)
            for engine in self._engines:
                ids = [name for name in engine.asked if name in unwanted]
                aborted += [_taken(engine, name) for name in ids]
                if ids:
                    with suppress(RayError):  # its loss is noticed by the thread that waits for it
                        ref = engine.worker.handle.abort.remote(ids)
                        engine.calls.append(Call(worker=engine.worker, ref=ref))
            self._send()
        for one in aborted:
            if one.future.cancel():
                one.future.set_running_or_notify_cancel()

    def score(self, sequences: Sequence[PackedTokens]) -> list[FloatArray]:
        """Log-probs by the first engine."""
        results = self._all(
            "scoring", lambda _index, handle: handle.score.remote(list(sequences)), self._control_timeout_s
        )
        return cast(list[list[FloatArray]], results)[0]

    def sleep(self) -> None:
        with self._is_settled:
            # An engine that starts now would not sleep, and one that still decodes what was aborted refuses to.
            self._is_settled.wait_for(lambda: not (self._num_replacing or any(e.is_served for e in self._engines)))
            calls = [call for engine in self._engines for call in engine.calls]
            for engine in self._engines:
                engine.calls = []
        self._group.wait(calls, phase="rollout abort", timeout_s=self._control_timeout_s)
        self._all("sleep", lambda _index, handle: handle.sleep.remote(), self._control_timeout_s)

    def wake_weights(self) -> None:
        """Of engines in sleep mode, wake the weights alone, for a weight sync. They serve nothing before `wake`."""
        self._release_memory()
        self._all("wake of weights", lambda _index, handle: handle.wake_weights.remote(), self._control_timeout_s)

    def wake(self) -> None:
        self._release_memory()
        self._all("wake", lambda _index, handle: handle.wake.remote(), self._control_timeout_s)

    def close(self) -> None:
        self._all("close", lambda _index, handle: handle.close.remote(), self._control_timeout_s)

    def usage(self) -> Mapping[str, float]:
        """How the engines were used since the last call: the share of the time in which they had requests, the mean
        over the engines and the lowest; and the seconds without any while another engine had some, the mean."""
        with self._lock:
            now = time.monotonic()
            total_s, self._read_at = max(now - self._read_at, 1e-9), now
            busy, any_busy_s = [engine.busy.take() for engine in self._engines], self._busy.take()
        if not busy:
            return {}
        mean_s = sum(busy) / len(busy)
        return {
            "throughput/busy_share": mean_s / total_s,
            "throughput/busy_share_min": min(busy) / total_s,
            "throughput/idle_tail_seconds": max(0.0, any_busy_s - mean_s),
        }

    def _release_memory(self) -> None:
        """Have the models on the same devices release unused memory."""
        for group in self._colocated:
            group.run(
                lambda _rank, handle: handle.release_memory.remote(),
                phase="release of memory for engines",
                timeout_s=self._colocated_timeout_s + self._control_timeout_s,
            )

    def _all(self, phase: str, submit: Submit, timeout_s: float) -> list[object]:
        return self._group.run(submit, phase=f"rollout {phase}", timeout_s=timeout_s)

    def _require_new(self, requests: Sequence[RolloutRequest]) -> None:
        """Raise RlhfError where two requests have the same id: responses are told apart by it. Holds the lock."""
        known = {one.request.id for group in self._queue for one in group}
        for request in requests:
            if request.id in known or any(request.id in engine.asked for engine in self._engines):
                raise RlhfError(f"{self._phase}: a request with the id {request.id} is under way already")
            known.add(request.id)

    def _send(self) -> None:
        """Give waiting requests to engines with room. Holds the lock."""
        calls: dict[int, list[_Asked]] = defaultdict(list)
        while self._queue and (self._slots is not None or not self._num_replacing):
            group = self._queue[0]
            index = least_loaded([engine.load for engine in self._engines], len(group), self._slots)
            if index is None:
                break
            engine = self._engines[index]
            for one in self._queue.popleft():
                engine.asked[one.request.id] = one
                engine.load.add(one.tokens)
            engine.busy.run(True)
            if group[0].is_repeated:
                self._submit_to(engine, group)
            else:
                calls[index] += group
        self._busy.run(any(engine.asked for engine in self._engines))
        for index, asked in calls.items():
            self._submit_to(self._engines[index], asked)

    def _submit_to(self, engine: _Engine, asked: Sequence[_Asked]) -> None:
        self._num_calls += 1
        for one in asked:
            one.call = self._num_calls
        try:
            ref = engine.worker.handle.submit.remote(self._name, [one.request for one in asked])
            engine.calls.append(Call(worker=engine.worker, ref=ref))
        except RayError as error:  # the arguments do not fit into the object store, or the worker is dead
            engine.failure = WorkerLostError(f"{PHASE}: {engine.worker} could not be called: {first_line(error)}")
        if not engine.is_served:
            engine.is_served = True
            threading.Thread(target=self._serve, args=(engine,), name=engine.worker.name, daemon=True).start()

    def _serve(self, engine: _Engine) -> None:
        """Collect an engine's responses until it has no requests. In a thread of its own."""
        start = time.monotonic()
        try:
            while self._collect(engine):
                pass
        except Exception as error:  # the boundary of the thread: those who wait for the futures raise it
            self._lose(engine, _known(error, engine.worker))
        else:
            self._tell_seconds(engine, time.monotonic() - start)

    def _collect(self, engine: _Engine) -> bool:
        """Wait for one or more responses. False: the engine has no requests any more."""
        with self._lock:
            if engine.failure is not None:
                raise engine.failure
            if not engine.asked:
                engine.is_served = False
                self._is_settled.notify_all()
                return False
            calls, engine.calls = engine.calls, []
        collected = Call(worker=engine.worker, ref=engine.worker.handle.collect.remote(self._name))
        *_, rollouts = self._group.wait(
            [*calls, collected], phase=f"{self._phase} {number_of(engine.worker)}", timeout_s=self._generate_timeout_s
        )
        ended = []
        with self._lock:
            for rollout in cast(list[Rollout], rollouts):
                if rollout.id in engine.asked:  # else it was aborted in the meantime
                    ended.append((_taken(engine, rollout.id), rollout))
            self._send()
        for one, rollout in ended:
            if one.future.set_running_or_notify_cancel():
                one.future.set_result(rollout)
        return True

    def _tell_seconds(self, engine: _Engine, seconds: float) -> None:
        """Tell the observers of waits how long each engine took, once all are done."""
        with self._lock:
            self._seconds.append((engine.worker, seconds))
            if any(engine.is_served for engine in self._engines):
                return
            told, self._seconds = self._seconds, []
        self._group.tell_seconds(PHASE, told)

    def _lose(self, engine: _Engine, error: RlhfError) -> None:
        """Give the requests of a lost engine to the others, and replace it. Where that cannot be, all futures end with
        the error. On the thread of the engine."""
        with self._lock:
            if engine not in self._engines:
                return  # its requests have failed already
            asked = list(engine.asked.values())
            can_go_on = isinstance(error, INFRASTRUCTURE) and not any(one.is_repeated for one in asked)
            if can_go_on:
                self._engines.remove(engine)
                self._num_replacing += 1
                for one in asked:
                    one.is_repeated = True
                calls = _by_prompt(asked) if self._slots is not None else _by_call(asked)
                self._queue.extendleft(reversed(calls))
                self._send()
        if can_go_on:
            self._replace(engine.worker, error)
        else:
            self._fail(error)

    def _replace(self, lost: Worker, error: RlhfError) -> None:
        """Have a new engine started, and given the live weights. On a thread of its own, or of the lost engine."""
        try:
            worker = self._group.start_again(lost, error)
            self._introduce(worker).add_done_callback(partial(self._welcome, worker))
        except Exception as worse:  # the boundary of the thread: those who wait for the futures raise it
            with self._is_settled:
                self._num_replacing -= 1
                self._is_settled.notify_all()
                self._failure = _known(worse, lost)
            self._fail(self._failure)

    def _welcome(self, worker: Worker, served: "Future[None]") -> None:
        """Give requests to a new engine, which serves the live weights now; or replace it, if it was lost before."""
        if (error := served.exception()) is not None:
            arguments = (worker, _known(error, worker))
            threading.Thread(target=self._replace, args=arguments, name=worker.name, daemon=True).start()
            return
        with self._is_settled:
            self._num_replacing -= 1
            self._is_settled.notify_all()
            self._engines.append(_Engine(worker))
            self._send()

    def _fail(self, error: RlhfError) -> None:
        """End the futures of all requests with an error."""
        with self._lock:
            unended = [one for engine in self._engines for one in engine.asked.values()]
            unended += [one for group in self._queue for one in group]
            self._queue.clear()
            self._name = uuid4().hex  # what the engines still have for the old name concerns nobody
            self._engines = [_Engine(engine.worker) for engine in self._engines]
            self._is_settled.notify_all()
        for one in unended:
            if one.future.set_running_or_notify_cancel():
                one.future.set_exception(error)


def number_of(engine: Worker) -> str:
    """The number in the name of an engine, which that in its place after a loss has too."""
    return engine.name.rpartition(" ")[2]


def _known(error: BaseException, worker: Worker) -> RlhfError:
    return error if isinstance(error, RlhfError) else WorkerLostError(f"{PHASE}: {worker}: {error!r}")


def _by_prompt(asked: Iterable[_Asked]) -> list[list[_Asked]]:
    """Neighboring requests for the same prompt together."""
    return [list(group) for _, group in groupby(asked, key=lambda one: one.request.prompt_id)]


def _by_call(asked: Iterable[_Asked]) -> list[list[_Asked]]:
    return [list(group) for _, group in groupby(asked, key=lambda one: one.call)]


def _taken(engine: _Engine, request_id: str) -> _Asked:
    """A request that an engine has, taken from it. Holds the lock."""
    one = engine.asked.pop(request_id)
    engine.load.remove(one.tokens)
    if not engine.asked:
        engine.busy.run(False)
    return one
