"""Rollout engines of this process that complete what a test says, and a pool of them."""

import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

import numpy as np

from rlhf.actors.calls import Call, Worker
from rlhf.actors.groups import Submit, WorkerGroup
from rlhf.actors.rollout import Introduce, RolloutPool, serves_already
from rlhf.actors.waiting import RemoteCalls
from rlhf.errors import RlhfError
from rlhf.types import FinishReason, Rollout, RolloutRequest, Sampling

WAIT_S = 10.0


class Remote:
    """A method as Ray shows it. Its call runs where somebody waits for it."""

    def __init__(self, method: Callable[..., object]) -> None:
        self._method = method

    def remote(self, *args: object) -> Callable[[], object]:
        if self._method.__name__ in ("submit", "abort"):
            self._method(*args)
            return lambda: None
        return lambda: self._method(*args)


class Engine:
    """An engine that completes what the test says, or fails."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.asked: list[RolloutRequest] = []
        self.calls: list[list[str]] = []
        self.aborted: list[str] = []
        self._ended: SimpleQueue[list[Rollout] | Exception] = SimpleQueue()

    def __getattr__(self, name: str) -> Remote:
        return Remote(getattr(self, f"_{name}"))

    def _submit(self, pool: str, requests: Sequence[RolloutRequest]) -> None:
        self.asked += requests
        self.calls.append([request.id for request in requests])

    def _collect(self, pool: str) -> list[Rollout]:
        try:
            ended = self._ended.get(timeout=WAIT_S)
        except Empty:  # the test is over
            return []
        if isinstance(ended, Exception):
            raise ended
        return ended

    def _abort(self, ids: Sequence[str]) -> None:
        self.aborted += ids
        self._ended.put([])

    def complete(self, *ids: str) -> None:
        known = {request.id: request for request in self.asked}
        self._ended.put([rollout(known[name], self.index) for name in ids])

    def complete_all(self) -> None:
        self.complete(*(request.id for request in self.asked))

    def fail(self, error: Exception) -> None:
        self._ended.put(error)


_submit = Engine._submit
for _name in ("submit", "collect", "abort"):
    getattr(Engine, f"_{_name}").__name__ = _name


def rollout(request: RolloutRequest, engine: int) -> Rollout:
    """A response that says by its version which engine sampled it."""
    return Rollout(
        id=request.id,
        prompt_id=request.prompt_id,
        token_ids=np.array([request.seed]),
        log_probs=np.zeros(1, np.float32),
        finish_reason=FinishReason.STOP,
        weight_version=engine,
    )


class Group(WorkerGroup):
    """Engines of this process; each of `others` takes the place of a lost one."""

    def __init__(self, engines: Sequence[Engine], *others: Engine) -> None:
        super().__init__(as_workers(engines), RemoteCalls())
        self._others = list(others)
        self.losses: list[str] = []
        self.seconds: list[list[str]] = []
        self.may_start = threading.Event()
        self.may_start.set()

    def wait(self, calls: Sequence[Call], *, phase: str, timeout_s: float) -> list[object]:
        return [call.ref() for call in calls]

    def run(self, submit: Submit, *, phase: str, timeout_s: float, peers: Sequence[Worker] = ()) -> list[object]:
        return []

    def start_again(self, lost: Worker, error: RlhfError) -> Worker:
        self.losses.append(f"{lost.name}: {error}")
        if not self._others:
            raise error
        assert self.may_start.wait(WAIT_S)
        (started,) = as_workers([self._others.pop(0)])
        return started

    def tell_seconds(self, phase: str, seconds: Sequence[tuple[Worker, float]]) -> None:
        self.seconds.append([worker.name for worker, _ in seconds])


def as_workers(engines: Sequence[Engine]) -> list[Worker]:
    return [
        Worker(handle=engine, name=f"engine {engine.index}", node="here", node_id="0", pid=engine.index)
        for engine in engines
    ]


def request(prompt: str, index: int = 0, max_tokens: int = 4) -> RolloutRequest:
    return RolloutRequest(
        id=f"{prompt}/{index}",
        prompt_id=prompt,
        prompt_token_ids=np.array([2, 3]),
        seed=index,
        sampling=Sampling(max_tokens=max_tokens),
    )


def pool_of(group: Group, slots: int | None = None, introduce: Introduce = serves_already) -> RolloutPool:
    return RolloutPool(group, generate_timeout_s=WAIT_S, control_timeout_s=WAIT_S, slots=slots, introduce=introduce)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)


def ids(engine: Engine) -> list[str]:
    return [request.id for request in engine.asked]
