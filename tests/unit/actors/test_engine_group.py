"""Engines that are lost and started again alone: who is left, who comes, and what all of them agree on."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlhf.actors.calls import Worker
from rlhf.actors.engine_group import EngineGroup
from rlhf.actors.groups import Submit
from rlhf.actors.waiting import RemoteCalls
from rlhf.errors import ModelError, RlhfError, StallError, WorkerLostError

pytestmark = pytest.mark.timeout(30)
DIED = WorkerLostError("it died")


def worker(place: int, pid: int) -> Worker:
    return Worker(handle=f"handle {pid}", name=f"rollout engine {place}", node="here", node_id="0", pid=pid)


class Engines(EngineGroup):
    """Engines 0, 1, ... with process ids 0, 1, ...; new ones have 10, 11, ..."""

    def __init__(self, count: int) -> None:
        super().__init__(
            [worker(place, place) for place in range(count)],
            RemoteCalls(),
            end=lambda workers: self.ended.extend(one.pid for one in workers),
            start=self._start_one,
            connect=lambda workers: self.connections.append([one.pid for one in workers]),
        )
        self.dead: set[int] = set()
        self.ended: list[int] = []
        self.started: list[str] = []
        self.connections: list[list[int]] = []
        self.may_start = threading.Event()
        self.may_start.set()
        self.problem: RlhfError | None = None

    @property
    def pids(self) -> list[int]:
        return [one.pid for one in self.workers]

    def _start_one(self, lost: Worker, error: RlhfError) -> Worker:
        assert lost.pid in self.ended, "its devices were not free"
        assert self.may_start.wait(10.0)
        if self.problem is not None:
            raise self.problem
        self.started.append(f"{lost.pid}: {error}")
        return worker(int(lost.name[-1]), 9 + len(self.started))

    def _silent(self, workers: Sequence[Worker], timeout_s: float) -> list[tuple[Worker, RlhfError]]:
        return [(one, WorkerLostError(f"{one.pid} died")) for one in workers if one.pid in self.dead]

    def _run(
        self, workers: Sequence[Worker], submit: Submit, phase: str, timeout_s: float, peers: Sequence[Worker]
    ) -> list[object]:
        if any(one.pid in self.dead for one in workers):
            raise DIED
        return [submit(rank, one.handle) for rank, one in enumerate(workers)]


def test_a_new_engine_takes_the_place_of_a_lost_one() -> None:
    engines = Engines(3)
    started = engines.start_again(engines.workers[1], DIED)
    assert engines.pids == [0, 10, 2]
    assert started.name == "rollout engine 1"
    assert engines.ended == [1]
    assert engines.started == ["1: it died"]


def test_while_a_new_engine_starts_the_others_are_called() -> None:
    engines = Engines(3)
    lost = engines.workers[1]
    engines.may_start.clear()
    with ThreadPoolExecutor(3) as threads:
        starting = [threads.submit(engines.start_again, lost, DIED) for _ in range(2)]
        while engines.pids != [0, 2]:
            threading.Event().wait(0.005)
        assert engines.run(lambda _rank, handle: handle, phase="x", timeout_s=1.0) == ["handle 0", "handle 2"]
        assert [one.pid for one in engines.alive(1.0)] == [0, 2]
        threads.submit(engines.start_again, engines.workers[0], DIED)
        engines.may_start.set()
        assert len({future.result().pid for future in starting}) == 1, "two took one place"
    assert sorted(engines.pids) == [2, 10, 11]
    assert [one.name[-1] for one in engines.workers] == ["0", "1", "2"]


def test_a_call_of_all_ends_those_that_do_not_reply_and_goes_to_the_others() -> None:
    engines = Engines(3)
    engines.dead = {0, 2}
    assert engines.run(lambda _rank, handle: handle, phase="x", timeout_s=1.0) == ["handle 1"]
    assert engines.ended == [0, 2]
    assert engines.started == []
    assert engines.start_again(worker(0, 0), DIED).pid == 10
    assert engines.started == ["0: 0 died"], "the first loss is the cause"


def test_a_call_that_fails_while_all_reply_is_an_error() -> None:
    engines, calls = Engines(2), []

    def refuse(_rank: int, handle: object) -> object:
        calls.append(handle)
        raise StallError("no reply to sleep")

    with pytest.raises(StallError, match="no reply to sleep"):
        engines.run(refuse, phase="x", timeout_s=1.0)
    assert engines.ended == []
    assert calls == ["handle 0"], "called again"


def test_of_some_alive_none_is_started_and_of_none_all_are() -> None:
    engines = Engines(3)
    engines.dead = {1}
    assert [one.pid for one in engines.some_alive(1.0)] == [0, 2]
    assert engines.started == []
    engines.dead |= {0, 2}
    assert len(engines.some_alive(1.0)) == 3
    assert engines.ended == [1, 0, 2]
    assert sorted(engines.started) == ["0: 0 died", "1: 1 died", "2: 2 died"]


def test_a_new_engine_that_cannot_start_is_told_with_the_loss() -> None:
    engines = Engines(1)
    engines.problem = StallError("placement: rollout waited 20 s")
    with pytest.raises(StallError, match=r"^it died It could not be replaced: placement: rollout waited 20 s"):
        engines.start_again(engines.workers[0], DIED)
    engines.problem = ModelError("policy.model: no such file")
    with pytest.raises(ModelError, match=r"^policy\.model"):
        engines.start_again(worker(0, 0), DIED)
    engines.problem = DIED
    with pytest.raises(WorkerLostError) as raised:
        engines.start_again(worker(0, 0), DIED)
    assert raised.value is DIED, "where engines are not replaced, the loss is the error"


def test_a_process_group_is_formed_only_where_its_members_change() -> None:
    engines = Engines(2)
    both = engines.workers
    engines.connect(both)
    assert engines.connections == []
    engines.connect(both[1:])
    engines.connect(both)
    engines.connect(both)
    assert engines.connections == [[1], [0, 1]]


def test_nothing_starts_in_the_places_of_an_attempt_that_is_over() -> None:
    engines = Engines(2)
    engines.close()
    with pytest.raises(WorkerLostError, match="it died"):
        engines.start_again(engines.workers[0], DIED)
    assert engines.started == []
    assert engines.ended == []
