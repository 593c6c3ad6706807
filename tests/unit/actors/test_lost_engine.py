"""The pool of rollout engines: what the loss of one costs."""

import threading
from concurrent.futures import Future

import pytest

from rlhf.actors.calls import Worker
from rlhf.errors import StallError, WorkerLostError
from tests.unit.actors.pool_support import WAIT_S, Engine, Group, ids, pool_of, request, wait_until

pytestmark = pytest.mark.timeout(30)


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
