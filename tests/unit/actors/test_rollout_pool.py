"""The pool of rollout engines: who serves which request."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future

import pytest

from rlhf.actors.calls import Worker
from rlhf.actors.groups import Submit
from rlhf.engines.base import generate
from rlhf.errors import ModelError, RlhfError, WorkerLostError
from rlhf.types import Rollout
from tests.unit.actors.pool_support import WAIT_S, Engine, Group, ids, pool_of, request

pytestmark = pytest.mark.timeout(30)


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


def test_whatever_ends_the_thread_of_an_engine_ends_its_futures() -> None:
    engines = [Engine(0)]
    (future,) = pool_of(Group(engines)).submit([request("a")])
    engines[0].fail(ZeroDivisionError("a bug"))
    with pytest.raises(WorkerLostError, match=r"engine 0 .*a bug"):
        future.result(WAIT_S)


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


def test_engines_sleep_once_they_know_what_was_aborted() -> None:
    class Slow(Engine):
        def _abort(self, ids: Sequence[str]) -> None:
            """Runs when somebody waits for the call, as its name is not that of the method."""
            self.aborted += ids

    class Sleeping(Group):
        def run(self, submit: Submit, *, phase: str, timeout_s: float, peers: Sequence[Worker] = ()) -> list[object]:
            events.append((phase, list(engine.aborted)))
            return []

    events: list[tuple[str, list[str]]] = []
    engine = Slow(0)
    pool = pool_of(Sleeping([engine]))
    pool.submit([request("a")])
    pool.abort(["a/0"])
    threading.Timer(0.3, engine.complete).start()  # its call of `collect` returns
    pool.sleep()
    assert events == [("rollout sleep", ["a/0"])]


def test_an_id_that_is_under_way_is_refused_and_may_come_again_later() -> None:
    """The response to the first request would be taken for the second one's."""
    engines = [Engine(0)]
    pool = pool_of(Group(engines), slots=1)
    first, waiting = pool.submit([request("a"), request("b")])
    for twice in ([request("a")], [request("b")], [request("c"), request("c")]):
        with pytest.raises(RlhfError, match=f"a request with the id {twice[0].id} is under way already"):
            pool.submit(twice)
    engines[0].complete("a/0")
    assert first.result(WAIT_S).id == "a/0"
    pool.abort(["b/0"])
    assert waiting.cancelled()
    pool.submit([request("c"), request("a")])


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
