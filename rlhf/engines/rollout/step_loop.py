"""A thread that owns a continuously batching decoder and steps it while there is work.

Any thread may ask for answers at any time; requests join the running batch at the next step, and each caller is
unblocked by its own answers. This is how an in-process vLLM core keeps an asynchronous protocol.
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

from rlhf.engines.rollout.serving import Serving, ServingGate
from rlhf.errors import RlhfError, StallError, WorkerLostError
from rlhf.types import FinishReason, FloatArray, IntArray, Sampling

T = TypeVar("T")
POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """Tokens to continue; or, where `sampling` is None, tokens to score."""

    token_ids: IntArray
    sampling: Sampling | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step added to one request. `prompt_log_probs` [prompt - 1] come once, for a request to score."""

    request_id: str
    token_ids: Sequence[int]
    log_probs: Sequence[float]
    prompt_log_probs: FloatArray | None = None
    finish_reason: FinishReason | None = None


class DecoderCore(Protocol):
    """A decoder that is used by one thread only."""

    def add(self, request_id: str, request: DecodeRequest) -> None:
        """Raises ModelError where the request cannot be served at all."""
        ...

    def abort(self, request_ids: Sequence[str]) -> None: ...

    def step(self) -> list[StepOutput]:
        """Advance all requests by a token or so."""
        ...


C = TypeVar("C", bound=DecoderCore)


@dataclass(slots=True)
class DecodedTokens:
    """All that was decoded for one request."""

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    prompt_log_probs: FloatArray = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    finish_reason: FinishReason = FinishReason.ABORTED


class StepLoop(Generic[C]):
    """Consumes: jobs (functions to run between steps) and requests, from any thread. Produces: answers, in futures.
    Waits for: a job when no request is under way or the gate is shut. Unblocked by: `call`, `decode`, `close`.

    An exception out of a step ends the loop: every waiting caller gets it as WorkerLostError, and so does every later
    one.
    """

    def __init__(self, name: str, build: Callable[[], C], gate: ServingGate) -> None:
        """`build` makes the core in the loop's own thread; its exception is raised here."""
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
        """Run `function` between two steps, on the loop's thread; returns what it returns, raises what it raises."""
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
                raise self._lost()
        return future.result()

    def decode(self, requests: Sequence[DecodeRequest], stall_timeout_s: float) -> list[DecodedTokens]:
        """Block until every request is answered; answer i is to request i.

        Raises StallError when no request of the loop gets a token for `stall_timeout_s`, and whatever `add` raised.
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
                raise self._lost()
            if waiting and idle_s > stall_timeout_s:
                missing = f"{len(waiting)} of {len(ids)} answers to come"
                error = StallError(f"engine {self._name}: no token for {idle_s:.1f} s with {missing}")
                # Not waited for: the loop may be stuck in a step for good.
                self._submit(partial(self._abort, ids, error))
                raise error
        return [future.result() for future in futures]

    def abort_all(self, error: RlhfError) -> None:
        """Give every waiting caller `error`. To be called on the loop's thread, by `call`."""
        self._abort(list(self._pending), error)

    @property
    def num_pending(self) -> int:
        """Requests under way."""
        return len(self._pending)

    def touch(self) -> None:
        """Count what was just done as progress: an update of the weights is not a stall of the answers."""
        self._progress = time.monotonic()

    def close(self, timeout_s: float) -> None:
        """End the loop after the step under way; waiting callers get an error."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _submit(self, job: Callable[[], None]) -> None:
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise self._lost()
            self._jobs.append(job)
            self._changed.notify()

    def _lost(self) -> WorkerLostError:
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
        self._abort_pending(self._lost())

    def _can_step(self) -> bool:
        return bool(self._pending) and self._gate.state is Serving.SERVING

    def _run_jobs(self) -> bool:
        """Run what was submitted, waiting for something while there is nothing to step; False when closing."""
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
                continue  # aborted meanwhile
            answer, future = self._pending[output.request_id]
            answer.token_ids += output.token_ids
            answer.log_probs += output.log_probs
            if output.prompt_log_probs is not None:
                answer.prompt_log_probs = output.prompt_log_probs
            self._progress = time.monotonic()
            if output.finish_reason is not None:
                answer.finish_reason = output.finish_reason
                del self._pending[output.request_id]
                future.set_result(answer)

    def _abort(self, request_ids: Sequence[str], error: Exception) -> None:
        pending = [request_id for request_id in request_ids if request_id in self._pending]
        self.core.abort(pending)
        for request_id in pending:
            self._pending.pop(request_id)[1].set_exception(error)

    def _abort_pending(self, error: Exception) -> None:
        """Unblock every caller without touching the core, which may be broken."""
        while self._pending:
            self._pending.popitem()[1][1].set_exception(error)
