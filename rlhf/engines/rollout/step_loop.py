"""A thread that owns a decoder with continuous batching and steps it while there is work.

Any thread may submit requests at any time; they join the running batch at the next step, and each caller is unblocked
by its own responses. This makes vLLM's in-process core usable from several threads.
"""

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

from rlhf.engines.process.memory_errors import named_memory_error
from rlhf.engines.rollout.serving import ServingGate, ServingState
from rlhf.errors import RlhfError, StallError, WorkerLostError
from rlhf.types import FinishReason, FloatArray, IntArray, Sampling

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
    """What one step added to one request. `prompt_log_probs` [prompt - 1] are given once, for a request to score."""

    request_id: str
    token_ids: Sequence[int]
    log_probs: Sequence[float]
    prompt_log_probs: FloatArray | None = None
    finish_reason: FinishReason | None = None


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
    """Everything that was decoded for one request."""

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    prompt_log_probs: FloatArray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    finish_reason: FinishReason = FinishReason.ABORTED


class StepLoop(Generic[C]):
    """The loop's thread and the queue of jobs for it.

    Consumes: jobs (functions to run between two steps; adding requests is one), from any thread. Produces: responses,
    in futures that the callers of `decode` wait for. Waits for: a job, while no request is running or the gate is not
    serving. Unblocked by: `call`, `decode`, `close`.

    If a step raises, the loop ends: every waiting caller, and every later one, gets WorkerLostError, or
    MemoryExhaustedError if memory ran out.
    """

    def __init__(self, name: str, build: Callable[[], C], gate: ServingGate) -> None:
        """`build` creates the core, on the loop's thread; an exception from it is raised here."""
        self._name = name
        self._gate = gate
        self._ids = itertools.count()
        self._jobs: deque[Callable[[], None]] = deque()
        self._pending: dict[str, tuple[DecodedTokens, Future[DecodedTokens]]] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._failure: Exception | None = None
        self._progress = time.monotonic()
        built: Future[C] = Future()
        self._thread = threading.Thread(target=self._run, args=(build, built), name=f"{name}-steps", daemon=True)
        self._thread.start()
        self.core = built.result()

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

    def decode(self, requests: Sequence[DecodeRequest], stall_timeout_s: float) -> list[DecodedTokens]:
        """Block until every request has its response; response i belongs to request i.

        Raises StallError when no request of the loop gets a token for `stall_timeout_s`, and what `add` raised.
        """
        ids = [str(next(self._ids)) for _ in requests]
        futures: list[Future[DecodedTokens]] = [Future() for _ in requests]

        def job() -> None:
            try:
                for request_id, request, future in zip(ids, requests, futures, strict=True):
                    self.core.add(request_id, request)
                    self._pending[request_id] = (DecodedTokens(), future)
            except Exception as error:
                self._abort(ids, error)
                for future in futures:
                    if not future.done():
                        future.set_exception(error)

        start = time.monotonic()
        self._submit(job)
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=POLL_S)
            for future in done:
                future.result()
            idle_s = time.monotonic() - max(start, self._progress)
            if waiting and not self._thread.is_alive():
                raise self._ended()
            if waiting and idle_s > stall_timeout_s:
                missing = f"{len(waiting)} of {len(ids)} responses missing"
                error = StallError(f"engine {self._name}: no token for {idle_s:.1f} s with {missing}")
                # Do not wait for the abort: the loop may be stuck in a step forever.
                self._submit(partial(self._abort, ids, error))
                raise error
        return [future.result() for future in futures]

    def abort_all(self, error: RlhfError) -> None:
        """Abort all requests: every waiting caller gets `error`. Call it on the loop's thread, through `call`."""
        self._abort(list(self._pending), error)

    @property
    def num_pending(self) -> int:
        """Number of running requests."""
        return len(self._pending)

    def mark_progress(self) -> None:
        """Restart the stall timer: the time of a weight update does not count as a stall."""
        self._progress = time.monotonic()

    def close(self, timeout_s: float) -> None:
        """End the loop after the current step; waiting callers get WorkerLostError."""
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
        self._abort_pending(self._ended())

    def _can_step(self) -> bool:
        return bool(self._pending) and self._gate.state is ServingState.SERVING

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
            if output.request_id not in self._pending:
                continue  # it was aborted in the meantime
            response, future = self._pending[output.request_id]
            response.token_ids += output.token_ids
            response.log_probs += output.log_probs
            if output.prompt_log_probs is not None:
                response.prompt_log_probs = output.prompt_log_probs
            self._progress = time.monotonic()
            if output.finish_reason is not None:
                response.finish_reason = output.finish_reason
                del self._pending[output.request_id]
                future.set_result(response)

    def _abort(self, request_ids: Sequence[str], error: Exception) -> None:
        pending = [request_id for request_id in request_ids if request_id in self._pending]
        self.core.abort(pending)
        for request_id in pending:
            self._pending.pop(request_id)[1].set_exception(error)

    def _abort_pending(self, error: Exception) -> None:
        """Unblock every caller without using the core, which may be broken."""
        while self._pending:
            self._pending.popitem()[1][1].set_exception(error)
