"""Engines over nodes: what is lost with one part, and what is closed with it."""

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
from rlhf.actors.engine_parts import PartWatch, RolloutPart

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
    monkeypatch.setattr(ray, "get", lambda refs, timeout: [ref.result(timeout) for ref in refs])
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


def test_workers_are_the_same_with_and_without_their_parts() -> None:
    """A run's lists of workers hold both."""
    engine = Worker(handle=None, name="engine", node="n", node_id="n", pid=1)
    parts = tuple(replace(engine, name=f"part {number}") for number in (1, 2))
    whole = replace(engine, parts=parts)
    assert engine == whole
    assert hash(engine) == hash(whole)
    assert with_parts([whole, engine]) == [engine, *parts, engine]
