"""The pool of rollout engines: who serves which request, and what a loss costs."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from queue import Empty, SimpleQueue

import numpy as np
import pytest

from rlhf.actors.calls import Call, Worker
from rlhf.actors.groups import Submit, WorkerGroup
from rlhf.actors.rollout import Introduce, RolloutPool, serves_already
from rlhf.actors.waiting import RemoteCalls
from rlhf.engines.base import generate
from rlhf.errors import ModelError, RlhfError, StallError, WorkerLostError
from rlhf.types import FinishReason, Rollout, RolloutRequest, Sampling

pytestmark = pytest.mark.timeout(30)
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


def test_responses_to_one_prompt_share_an_engine_and_engines_share_the_prompts() -> None:
    engines = [Engine(0), Engine(1)]
    pool_of(Group(engines)).submit([request(prompt, index) for prompt in "abcd" for index in range(2)])
    assert ids(engines[0]) == ["a/0", "a/1", "c/0", "c/1"]
    assert ids(engines[1]) == ["b/0", "b/1", "d/0", "d/1"]


def test_a_request_goes_where_the_fewest_tokens_are_outstanding() -> None:
    engines = [Engine(0), Engine(1)]
    pool = pool_of(Group(engines))
    first, *_ = pool.submit([request("a", max_tokens=100), *(request(name, max_tokens=10) for name in "bcd")])
    assert ids(engines[1]) == ["b/0", "c/0", "d/0"]
    engines[0].complete("a/0")
    assert first.result(WAIT_S).weight_version == 0
    pool.submit([request("e")])
    assert ids(engines[0]) == ["a/0", "e/0"]


def test_each_response_comes_by_itself_and_makes_room_for_what_waits() -> None:
    """A slow engine gets less: what no engine has room for waits for the first that has."""
    engines = [Engine(0), Engine(1)]
    futures = pool_of(Group(engines), slots=2).submit([request(name) for name in "abcdefgh"])
    assert [len(engine.asked) for engine in engines] == [2, 2]
    for name in "ace":
        engines[0].complete(f"{name}/0")
        futures["abcdefgh".index(name)].result(WAIT_S)
    assert ids(engines[0]) == [f"{name}/0" for name in "acefg"]
    assert ids(engines[1]) == ["b/0", "d/0"]
    assert not futures[1].done()


def test_a_batch_is_gathered_in_the_order_of_its_requests() -> None:
    engines = [Engine(0), Engine(1)]
    pool = pool_of(Group(engines))
    requests = [request(name) for name in "abcde"]
    futures = pool.submit(requests)
    for engine in engines:
        engine.complete(*reversed(ids(engine)))
    assert [future.result(WAIT_S).id for future in futures] == [one.id for one in requests]


def test_the_others_take_over_from_a_lost_engine_and_a_new_one_takes_its_place() -> None:
    engines, new = [Engine(0), Engine(1)], Engine(2)
    group = Group(engines, new)
    pool = pool_of(group, slots=8)
    group.may_start.clear()
    futures = pool.submit([request(name) for name in "abcd"])
    engines[0].complete("a/0")
    assert futures[0].result(WAIT_S).weight_version == 0
    engines[0].fail(WorkerLostError("engine 0 died"))
    wait_until(lambda: ids(engines[1]) == ["b/0", "d/0", "c/0"])
    engines[1].complete_all()
    assert [future.result(WAIT_S).weight_version for future in futures] == [0, 1, 1, 1]
    group.may_start.set()
    wait_until(lambda: len(pool._engines) == 2)
    (later,) = pool.submit([request("e")])
    pool.submit([request("f")])
    assert ids(new) == ["f/0"]
    engines[1].complete("e/0")
    assert later.result(WAIT_S).weight_version == 1
    assert group.losses == ["engine 0: engine 0 died"]


def test_where_the_only_engine_is_lost_its_requests_wait_for_the_new_one() -> None:
    engine, new = Engine(0), Engine(1)
    pool = pool_of(Group([engine], new), slots=1)
    futures = pool.submit([request(name) for name in "ab"])
    engine.fail(WorkerLostError("engine 0 died"))
    wait_until(lambda: ids(new) == ["a/0"])
    new.complete("a/0")
    wait_until(lambda: ids(new) == ["a/0", "b/0"])
    new.complete("b/0")
    assert [future.result(WAIT_S).weight_version for future in futures] == [1, 1]


def test_without_continuous_batching_the_calls_of_a_lost_engine_are_made_again_as_they_were() -> None:
    """What shares a call shares matrices, whose shapes round the last bits of log-probs."""
    engines, new = [Engine(0), Engine(1)], Engine(2)
    group = Group(engines, new)
    group.may_start.clear()
    pool = pool_of(group)
    pool.submit([request(name) for name in "abcd"])
    later = pool.submit([request("e", max_tokens=100), request("f")])
    assert [ids(engine) for engine in engines] == [["a/0", "c/0", "e/0"], ["b/0", "d/0", "f/0"]]
    engines[0].fail(WorkerLostError("engine 0 died"))
    wait_until(lambda: group.losses)
    (last,) = pool.submit([request("g")])
    pool.abort(["e/0"])
    engines[1].complete_all()
    assert later[1].result(WAIT_S).weight_version == 1
    assert [ids(engine) for engine in engines][1] == ["b/0", "d/0", "f/0"], "asked while an engine was missing"
    group.may_start.set()
    wait_until(lambda: len(engines[1].asked) + len(new.asked) == 6)
    assert ["a/0", "c/0"] in (engines[1].calls[-1], new.calls[0] if new.calls else [])
    for engine in (engines[1], new):
        engine.complete(*(name for name in ids(engine) if name in ("a/0", "c/0", "g/0")))
    assert last.result(WAIT_S).id == "g/0"


def test_a_new_engine_gets_nothing_before_it_serves_the_live_weights() -> None:
    served: list[Future[None]] = []

    def introduce(worker: Worker) -> Future[None]:
        assert worker.name == f"engine {len(served) + 1}"
        served.append(Future())
        return served[-1]

    engine, others = Engine(0), [Engine(1), Engine(2)]
    group = Group([engine], *others)
    (future,) = pool_of(group, introduce=introduce).submit([request("a")])
    engine.fail(WorkerLostError("engine 0 died"))
    wait_until(lambda: len(served) == 1)
    assert others[0].asked == []
    served[0].set_exception(WorkerLostError("engine 1 died before the sync"))
    wait_until(lambda: len(served) == 2)
    served[1].set_result(None)
    wait_until(lambda: others[1].asked)
    others[1].complete_all()
    assert future.result(WAIT_S).weight_version == 2
    assert others[0].asked == []
    assert group.losses == ["engine 0: engine 0 died", "engine 1: engine 1 died before the sync"]


def test_engines_do_not_sleep_before_a_new_one_can() -> None:
    engines = [Engine(0), Engine(1)]
    group = Group(engines, Engine(2))
    group.may_start.clear()
    pool = pool_of(group, slots=8)
    futures = pool.submit([request(name) for name in "ab"])
    engines[0].fail(WorkerLostError("engine 0 died"))
    wait_until(lambda: len(ids(engines[1])) == 2)
    engines[1].complete_all()
    for future in futures:
        future.result(WAIT_S)
    sleeping = threading.Thread(target=pool.sleep)
    sleeping.start()
    sleeping.join(0.1)
    assert sleeping.is_alive()
    group.may_start.set()
    sleeping.join(WAIT_S)
    assert not sleeping.is_alive()


def test_whatever_ends_the_thread_of_an_engine_ends_its_futures() -> None:
    engines = [Engine(0)]
    (future,) = pool_of(Group(engines)).submit([request("a")])
    engines[0].fail(ZeroDivisionError("a bug"))
    with pytest.raises(WorkerLostError, match=r"engine 0 .*a bug"):
        future.result(WAIT_S)


def test_requests_that_are_lost_twice_are_an_error() -> None:
    engines, new = [Engine(0)], Engine(1)
    (future,) = pool_of(Group(engines, new, Engine(2))).submit([request("a")])
    engines[0].fail(StallError("engine 0 is stuck"))
    wait_until(lambda: new.asked)
    new.fail(StallError("engine 1 is stuck"))
    with pytest.raises(StallError, match="engine 1 is stuck"):
        future.result(WAIT_S)


def test_where_a_lost_engine_cannot_be_replaced_all_responses_end_with_the_loss() -> None:
    engines = [Engine(0), Engine(1)]
    pool = pool_of(Group(engines))
    futures = pool.submit([request(name) for name in "abcd"])
    engines[1].complete("b/0")
    assert futures[1].result(WAIT_S).id == "b/0"
    engines[0].fail(WorkerLostError("engine 0 died"))
    for index in (0, 2, 3):
        with pytest.raises(WorkerLostError, match="engine 0 died"):
            futures[index].result(WAIT_S)
    (later,) = pool.submit([request("e")])
    with pytest.raises(WorkerLostError, match="engine 0 died"):
        later.result(WAIT_S)


def test_an_error_that_is_no_loss_ends_everything_at_once_and_replaces_nobody() -> None:
    engines = [Engine(0), Engine(1)]
    group = Group(engines, Engine(2))
    pool = pool_of(group)
    thread_errors: list[RlhfError] = []

    def call() -> None:
        try:
            generate(pool, [request(name) for name in "abcd"])
        except RlhfError as error:
            thread_errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    while not engines[0].asked:
        threading.Event().wait(0.01)
    engines[0].fail(ModelError("a prompt of 9000 tokens"))
    thread.join(WAIT_S)
    assert [str(error) for error in thread_errors] == ["a prompt of 9000 tokens"]
    assert group.losses == []


def test_aborted_requests_are_cancelled_wherever_they_are() -> None:
    engines = [Engine(0)]
    pool = pool_of(Group(engines), slots=1)
    futures = pool.submit([request(name) for name in "abc"])
    pool.abort(["a/0", "c/0", "unknown"])
    for index in (0, 2):
        with pytest.raises(CancelledError):
            futures[index].result(WAIT_S)
    assert engines[0].aborted == ["a/0"]
    deadline: Future[Rollout] = futures[1]
    while not ids(engines[0])[1:]:
        threading.Event().wait(0.01)  # the engine's thread asks for what waited
    engines[0].complete("b/0")
    assert deadline.result(WAIT_S).id == "b/0"


def test_how_long_each_engine_took_is_told_once_all_are_done() -> None:
    engines = [Engine(0), Engine(1)]
    group = Group(engines)
    pool = pool_of(group)
    futures = pool.submit([request(name) for name in "ab"])
    engines[0].complete_all()
    futures[0].result(WAIT_S)
    assert group.seconds == []
    engines[1].complete_all()
    futures[1].result(WAIT_S)
    while not group.seconds:
        threading.Event().wait(0.01)
    assert [sorted(names) for names in group.seconds] == [["engine 0", "engine 1"]]
    usage = pool.usage()
    assert 0.0 < usage["throughput/busy_share_min"] <= usage["throughput/busy_share"] <= 1.0


def test_an_engine_without_requests_idles_in_the_tail_of_another() -> None:
    engines = [Engine(0), Engine(1)]
    pool = pool_of(Group(engines))
    futures = pool.submit([request(name) for name in "ab"])
    engines[0].complete_all()
    futures[0].result(WAIT_S)
    pool.usage()
    start = time.monotonic()
    threading.Event().wait(0.1)
    engines[1].complete_all()
    futures[1].result(WAIT_S)
    usage = pool.usage()
    assert 0.05 <= usage["throughput/idle_tail_seconds"] <= (time.monotonic() - start) / 2
    assert usage["throughput/busy_share_min"] == 0.0
    threading.Event().wait(0.05)
    assert pool.usage()["throughput/idle_tail_seconds"] == 0.0, "all of them idle: nobody waits for another"
