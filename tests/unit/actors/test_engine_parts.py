"""Engines over nodes: what is lost with one part, and what is closed with it."""

import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rlhf.actors.calls import Worker, with_parts
from rlhf.actors.engine_parts import CLOSE_TIMEOUT_S, PartWatch, RolloutPart
from rlhf.actors.rendezvous import RendezvousActor
from rlhf.actors.rollout_workers import STORE_TIMEOUT_S, RolloutWorker
from rlhf.config.rollout import RolloutSection
from rlhf.engines.rollout.spec import EngineSpec

pytestmark = pytest.mark.timeout(30)


@dataclass
class Part:
    """A part on another node, as far as the engine's worker sees it."""

    number: int
    closed: "Future[None]" = field(default_factory=Future)
    num_closes: int = 0

    @property
    def worker(self) -> Worker:
        handle: Any = SimpleNamespace(
            closed=SimpleNamespace(remote=lambda: self.closed), close=SimpleNamespace(remote=self._close)
        )
        return Worker(handle=handle, name=f"part {self.number}", node="n", node_id=f"n{self.number}", pid=self.number)

    def _close(self) -> "Future[None]":
        self.num_closes += 1
        self.closed.set_result(None)
        return self.closed


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> Iterator["SimpleQueue[int]"]:
    """The codes with which the process would have ended; calls of parts are futures."""

    def wait_for(
        refs: Sequence["Future[None]"], *, num_returns: int, timeout: float
    ) -> tuple[list["Future[None]"], list["Future[None]"]]:
        assert num_returns == 1
        done = wait(refs, timeout=timeout, return_when=FIRST_COMPLETED).done
        return [ref for ref in refs if ref in done][:1], [ref for ref in refs if ref not in done]

    codes: SimpleQueue[int] = SimpleQueue()
    monkeypatch.setattr(ray, "wait", wait_for)

    def get(refs: Sequence["Future[None]"], *, timeout: float) -> list[None]:
        assert timeout == CLOSE_TIMEOUT_S, "a part that hangs must not keep its engine from closing"
        return [ref.result(timeout) for ref in refs]

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr("rlhf.actors.engine_parts.os._exit", codes.put)
    monkeypatch.setattr("rlhf.actors.engine_parts.LOOK_EVERY_S", 0.01)
    yield codes
    assert codes.empty()


def joined(name: str) -> None:
    """Wait for the end of the thread with this name."""
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(10)
            assert not thread.is_alive()


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_an_engine_ends_with_any_of_its_parts(lost: int, exits: "SimpleQueue[int]") -> None:
    parts = [Part(number) for number in range(3)]
    PartWatch("engine", [part.worker for part in parts])
    parts[lost].closed.set_exception(RuntimeError("the actor died"))
    assert exits.get(timeout=10) == 1
    joined("engine-parts")


def test_a_closed_engine_closes_its_parts_and_does_not_end(exits: "SimpleQueue[int]") -> None:
    parts = [Part(number) for number in range(2)]
    watch = PartWatch("engine", [part.worker for part in parts])
    watch.close()
    joined("engine-parts")
    assert [part.num_closes for part in parts] == [1, 1]
    assert exits.empty()


@pytest.mark.parametrize(("was_closed", "codes"), [(False, [1]), (True, [])])
def test_a_part_ends_with_its_processes(
    was_closed: bool,
    codes: list[int],
    exits: "SimpleQueue[int]",
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Unless it was closed, which ends them."""
    monkeypatch.chdir(tmp_path)
    part: Any = SimpleNamespace(wait=lambda: was_closed)
    RolloutPart(tmp_path, None)._end_with_part(part, "part 1")
    assert [exits.get(timeout=10) for _ in codes] == codes


def test_a_call_waits_until_the_part_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    part = RolloutPart(tmp_path, None)
    ended = threading.Thread(target=part.closed, daemon=True)
    ended.start()
    assert ended.is_alive()
    part.close()
    ended.join(10)
    assert not ended.is_alive()


SPEC = EngineSpec(section=RolloutSection(num_nodes_per_engine=2), model="m", dtype="float32", device="cpu")


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[object]:
    """What happens in the processes of an engine, whose node has the address 127.0.0.2, in its order."""
    found: list[object] = []

    class Watch:
        def __init__(self, name: str, parts: Sequence[Worker]) -> None:
            found.append(("watch", name, [part.name for part in parts]))

        def close(self) -> None:
            found.append("close parts")

    def opened(spec: EngineSpec, *, name: str) -> Any:
        assert spec is SPEC
        found.append(("open", name))
        return SimpleNamespace(close=lambda: found.append("close"))

    def part(spec: EngineSpec) -> Any:
        assert spec is SPEC
        found.append("open part")
        return SimpleNamespace(close=lambda: found.append("close part"), wait=waited)

    def waited() -> bool:
        found.append("wait")
        return True

    monkeypatch.chdir(tmp_path)
    for place in ("engine_parts", "rendezvous"):
        monkeypatch.setattr(f"rlhf.actors.{place}.node_address", lambda: "127.0.0.2")
    rendezvous = "rlhf.engines.process.rendezvous"
    monkeypatch.setattr(f"{rendezvous}.bind_collectives", lambda address: found.append(("bind", address)))
    monkeypatch.setattr(f"{rendezvous}.serve_store", lambda listener, timeout_s: Store(listener, timeout_s, found))
    monkeypatch.setattr("rlhf.actors.rollout_workers.PartWatch", Watch)
    monkeypatch.setattr("rlhf.actors.rollout_workers.open_engine", opened)
    environment: Any = SimpleNamespace(set_environment=lambda spec: found.append(("environment", spec is SPEC)))
    monkeypatch.setitem(sys.modules, "rlhf.engines.rollout.vllm_environment", environment)
    vllm_part: Any = SimpleNamespace(VllmPart=part)
    monkeypatch.setitem(sys.modules, "rlhf.engines.rollout.vllm_part", vllm_part)
    return found


class Store:
    """Lives as long as something refers to it."""

    def __init__(self, listener: socket.socket, timeout_s: float, events: list[object]) -> None:
        listener.close()
        assert timeout_s == STORE_TIMEOUT_S
        self._events = events
        events.append("serve")

    def __del__(self) -> None:
        self._events.append("store gone")


def test_an_engine_serves_the_store_and_watches_its_parts_while_it_loads(events: list[object], tmp_path: Path) -> None:
    """It waits for the parts, so that it must see when one is lost meanwhile; and it closes with all of them."""
    worker = RolloutWorker(tmp_path, None)
    address, port = worker.open_rendezvous()
    assert (address, port > 0) == ("127.0.0.2", True)
    worker.start(SPEC, "engine", (), [Part(1).worker, Part(2).worker])
    started = [("bind", "127.0.0.2"), "serve", ("watch", "engine", ["part 1", "part 2"]), ("open", "engine")]
    assert events == started
    worker.close()
    assert events == [*started, "close parts", "close"]
    del worker
    assert events[-1] == "store gone"


def test_an_engine_on_one_node_serves_nothing(events: list[object], tmp_path: Path) -> None:
    worker = RolloutWorker(tmp_path, None)
    worker.start(SPEC, "engine", ())
    worker.close()
    assert events == [("bind", "127.0.0.2"), ("open", "engine"), "close"]


def test_a_part_loads_its_share_and_watches_its_processes(events: list[object], tmp_path: Path) -> None:
    part = RolloutPart(tmp_path, None)
    part.start(SPEC, "part 1", ())
    joined("part 1-watch")
    assert events == [("bind", "127.0.0.2"), ("environment", True), "open part", "wait"]
    part.close()
    assert events[-1] == "close part"


def test_workers_that_meet_listen_on_their_nodes_address_alone_each_on_a_port_of_its_own(
    events: list[object], tmp_path: Path
) -> None:
    actors = [RendezvousActor(tmp_path, None) for _ in range(3)]
    places = [actor.open_rendezvous() for actor in actors]
    assert events == []
    assert {address for address, _ in places} == {"127.0.0.2"}
    assert len({port for _, port in places}) == 3
    for actor, place in zip(actors, places, strict=True):
        assert actor._listener is not None
        assert actor._listener.getsockname()[:2] == place
        actor._listener.close()


def test_workers_are_the_same_with_and_without_their_parts() -> None:
    """A run's lists of workers hold both."""
    engine = Worker(handle=None, name="engine", node="n", node_id="n", pid=1)
    parts = tuple(replace(engine, name=f"part {number}") for number in (1, 2))
    whole = replace(engine, parts=parts)
    assert engine == whole
    assert hash(engine) == hash(whole)
    assert with_parts([whole, engine]) == [engine, *parts, engine]
