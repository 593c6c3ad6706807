"""A thread that owns a decoder with continuous batching and steps it while there is work.

Any thread may submit requests at any time; they join the running batch at the next step, and each has a future of its
own. This makes vLLM's in-process core usable from several threads.
"""

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar

import numpy as np

from rlhf.engines.base import gather
from rlhf.engines.process.memory_errors import named_memory_error
from rlhf.engines.rollout.serving import ServingGate, ServingState
from rlhf.errors import RlhfError, StallError, WorkerLostError
from rlhf.types import ExpertArray, FinishReason, FloatArray, IntArray, Sampling

T = TypeVar("T")
POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """Tokens to continue; or, if `sampling` is None, tokens to score."""

    token_ids: IntArray
    sampling: Sampling | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step added to one request. `prompt_log_probs` [prompt - 1] are given once, for a request to score;
    `routed_experts` at its end, of at least all tokens but the last, by a core that records them."""

    request_id: str
    token_ids: Sequence[int]
    log_probs: Sequence[float]
    prompt_log_probs: FloatArray | None = None
    finish_reason: FinishReason | None = None
    routed_experts: ExpertArray | None = None


class DecoderCore(Protocol):
    """A decoder with continuous batching; used by one thread only."""

    def add(self, request_id: str, request: DecodeRequest) -> None:
        """Add a request to the batch. Raises ModelError if it can never be served."""
        ...

    def abort(self, request_ids: Sequence[str]) -> None: ...

    def step(self) -> list[StepOutput]:
        """Advance the running requests, usually by one token each."""
        ...


C = TypeVar("C", bound=DecoderCore)


@dataclass(slots=True)
class DecodedTokens:
    """Everything that was decoded for one request. `weight_version` is the one that decoded its first token, and
    `newest_version` the last one's, which also decoded those from `num_older_tokens` on."""

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    prompt_log_probs: FloatArray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    finish_reason: FinishReason = FinishReason.ABORTED
    weight_version: int = 0
    newest_version: int = 0
    num_older_tokens: int = 0
    routed_experts: ExpertArray | None = None


class StepLoop(Generic[C]):
    """The loop's thread and the queue of jobs for it, and a thread that watches it.

    The loop
        consumes: jobs (functions to run between two steps; adding requests is one), from any thread. Produces:
        responses, in the futures of `submit`. Waits for: a job, while no request is running or the gate is not serving.
        Unblocked by: `call`, `submit`, `abort`, `close`.
    The watch
        ends all futures with StallError when no request gets a token for `stall_timeout_s`: the loop may be in a step
        that never ends. Unblocked by: `close`.

    If a step raises, the loop ends: every future, and every later caller, gets WorkerLostError, or MemoryExhaustedError
    if memory ran out.
    """

    def __init__(self, name: str, build: Callable[[], C], gate: ServingGate, stall_timeout_s: float) -> None:
        """`build` creates the core, on the loop's thread; an exception from it is raised here."""
        self._name = name
        self._gate = gate
        self._stall_timeout_s = stall_timeout_s
        self._ids = itertools.count()
        self._jobs: deque[Callable[[], None]] = deque()
        self._awaited: dict[str, Future[DecodedTokens]] = {}
        """Futures that have not ended. Who takes one out ends it."""
        self._running: dict[str, DecodedTokens] = {}
        """What was decoded for the requests that the core has. Of the loop's thread."""
        self._changed = threading.Condition()
        self._closing = False
        self._ended_event = threading.Event()
        self._failure: Exception | None = None
        self._progress = time.monotonic()
        built: Future[C] = Future()
        self._thread = threading.Thread(target=self._run, args=(build, built), name=f"{name}-steps", daemon=True)
        self._thread.start()
        self.core = built.result()
        threading.Thread(target=self._watch, name=f"{name}-watch", daemon=True).start()

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the loop's thread, between two steps; returns its result, or raises its exception."""
        future: Future[T] = Future()

        def job() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._submit(job)
        while not future.done():
            wait([future], timeout=POLL_S)
            if not self._thread.is_alive() and not future.done():
                raise self._ended()
        return future.result()

    def submit(self, requests: Sequence[DecodeRequest]) -> dict[str, "Future[DecodedTokens]"]:
        """Add requests to the batch. Returns a future for each, in their order, under the id that `abort` takes. One
        that the core refuses ends with what `add` raised, and no other with it."""
        futures: dict[str, Future[DecodedTokens]] = {str(next(self._ids)): Future() for _ in requests}

        def job() -> None:
            for request_id, request in zip(futures, requests, strict=True):
                if request_id not in self._awaited:
                    continue  # it was aborted before it began
                try:
                    self.core.add(request_id, request)
                    self._running[request_id] = DecodedTokens()
                except Exception as error:
                    self._fail([request_id], error)

        if not self._awaited:
            self._progress = time.monotonic()
        self._awaited.update(futures)
        try:
            self._submit(job)
        except RlhfError as error:
            self._fail(list(futures), error)
            raise
        return futures

    def decode(self, requests: Sequence[DecodeRequest]) -> list[DecodedTokens]:
        """Block until every request has its response; response i belongs to request i. Raises the first error."""
        futures = self.submit(requests)
        ids = list(futures)
        return gather(list(futures.values()), lambda late: self.abort([ids[index] for index in late]))

    def abort(self, request_ids: Sequence[str]) -> None:
        """Cancel the futures of requests, and stop decoding them at the next step."""
        for request_id in request_ids:
            if (future := self._awaited.pop(request_id, None)) is not None and future.cancel():
                future.set_running_or_notify_cancel()
        with contextlib.suppress(RlhfError):  # a loop that has ended decodes nothing
            self._submit(partial(self._drop, request_ids))

    def abort_all(self, error: RlhfError) -> None:
        """End all futures with `error`. Call it on the loop's thread, through `call`."""
        self._fail(list(self._awaited), error)
        self._drop(list(self._running))

    @property
    def num_pending(self) -> int:
        """Requests whose responses are not complete."""
        return len(self._awaited)

    def close(self, timeout_s: float) -> None:
        """End the loop after the current step; the futures end with WorkerLostError."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _submit(self, job: Callable[[], None]) -> None:
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise self._ended()
            self._jobs.append(job)
            self._changed.notify()

    def _ended(self) -> RlhfError:
        if self._failure is not None and (named := named_memory_error(self._failure, self._name, "engine")) is not None:
            return named
        return WorkerLostError(f"engine {self._name}: its decoder has ended: {self._failure or 'it was closed'!r}")

    def _run(self, build: Callable[[], C], built: "Future[C]") -> None:
        try:
            core = build()
        except Exception as error:
            self._failure = error
            built.set_exception(error)
            return
        built.set_result(core)
        try:
            while self._run_jobs():
                if self._can_step():
                    self._deliver(core.step())
        except Exception as error:
            self._failure = error
        # Without using the core, which may be broken.
        self._ended_event.set()
        self._fail(list(self._awaited), self._ended())

    def _watch(self) -> None:
        while not self._ended_event.wait(min(POLL_S, self._stall_timeout_s / 4)):
            if self._gate.state is ServingState.UPDATING:
                self._progress = time.monotonic()  # a weight update is no stall; it has a deadline of its own
            idle_s = time.monotonic() - self._progress
            if (missing := list(self._awaited)) and idle_s > self._stall_timeout_s:
                text = f"engine {self._name}: no token for {idle_s:.1f} s with {len(missing)} responses missing"
                self._fail(missing, StallError(text))
                with contextlib.suppress(RlhfError):
                    self._submit(partial(self._drop, missing))

    def _can_step(self) -> bool:
        return bool(self._running) and self._gate.state is ServingState.SERVING

    def _run_jobs(self) -> bool:
        """Run the submitted jobs; waits for one while there is nothing to step. False when the loop is closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closing or self._can_step())
            jobs, self._jobs = self._jobs, deque()
            closing = self._closing
        for job in jobs:
            job()
        return not closing

    def _deliver(self, outputs: Sequence[StepOutput]) -> None:
        for output in outputs:
            if (response := self._running.get(output.request_id)) is None:
                continue  # it was aborted in the meantime
            if not response.token_ids:
                response.weight_version = response.newest_version = self._gate.version
            elif response.newest_version != self._gate.version:
                response.newest_version, response.num_older_tokens = self._gate.version, len(response.token_ids)
            response.token_ids += output.token_ids
            response.log_probs += output.log_probs
            if output.prompt_log_probs is not None:
                response.prompt_log_probs = output.prompt_log_probs
            self._progress = time.monotonic()
            if output.finish_reason is not None:
                response.finish_reason = output.finish_reason
                response.routed_experts = output.routed_experts
                del self._running[output.request_id]
                future = self._awaited.pop(output.request_id, None)
                if future is not None and future.set_running_or_notify_cancel():
                    future.set_result(response)

    def _drop(self, request_ids: Sequence[str]) -> None:
        """Stop decoding requests. On the loop's thread."""
        running = [request_id for request_id in request_ids if self._running.pop(request_id, None) is not None]
        self.core.abort(running)

    def _fail(self, request_ids: Sequence[str], error: Exception) -> None:
        """End the futures of requests with `error`, those that have not ended."""
        for request_id in request_ids:
            future = self._awaited.pop(request_id, None)
            if future is not None and future.set_running_or_notify_cancel():
                future.set_exception(error)
