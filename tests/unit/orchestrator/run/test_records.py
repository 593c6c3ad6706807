"""What a run records of its steps, events and end, and what it does without a record."""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.run import LogSection
from rlhf.errors import CheckpointError, PreemptedError
from rlhf.orchestrator.run.console import make_console
from rlhf.orchestrator.run.records import Records
from rlhf.orchestrator.run.responses import StepResponses
from rlhf.orchestrator.run.run_directory import RunDirectory
from rlhf.repair import Repair, RepairKind
from rlhf.types import Json
from tests.unit.orchestrator.support import as_sampled, given_group


class Tracker:
    """Notes what it is given. `is_full` is one whose disk is."""

    def __init__(self) -> None:
        self.events: list[object] = []
        self.is_full = False

    def log(self, step: int, metrics: Mapping[str, Json]) -> None:
        if self.is_full:
            raise CheckpointError("metrics: disk full")
        self.events.append((step, dict(metrics)))

    def close(self) -> None:
        self.events.append("closed")


class World:
    def __init__(self, directory: RunDirectory, **log: Any) -> None:
        self.directory, self.out, self.tracker = directory, io.StringIO(), Tracker()
        section = LogSection.model_validate(log)
        self.records = Records(directory, lambda: [self.tracker], make_console(9, self.out), section, num_steps=9)

    def status(self) -> tuple[str, int, int, str | None]:
        found = json.loads((self.directory.path / "status.json").read_text())
        return found["status"], found["step"], found["num_steps"], found["error"]

    def events(self) -> list[dict[str, Json]]:
        rows = [json.loads(line) for line in self.directory.events.read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "time"} for row in rows]


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory.open(tmp_path / "run", resume=False) as run:
        yield run


def responses(text: str = "abba") -> StepResponses:
    return StepResponses(trained=[as_sampled(given_group(1, [text, "b"], [1.0, 0.0]))])


def test_a_step_is_recorded_everywhere(directory: RunDirectory) -> None:
    world = World(directory, sample_every_steps=2)
    with world.records.open():
        for step in (3, 4):
            world.records.step(step, {"loss": 0.5}, responses("ab" * step))
    assert world.tracker.events == [(3, {"loss": 0.5}), (4, {"loss": 0.5}), "closed"]
    assert [path.name for path in sorted(directory.rollouts.iterdir())] == ["step_000003.jsonl", "step_000004.jsonl"]
    assert world.status() == ("running", 4, 9, None)
    assert "abababab" in world.out.getvalue()
    assert world.out.getvalue().count("ababab") == 1, "samples are shown every second step"


@pytest.mark.parametrize("every_steps", [0, 1])
def test_samples_and_rollouts_are_left_out_where_asked(every_steps: int, directory: RunDirectory) -> None:
    world = World(directory, sample_every_steps=every_steps, rollouts=False)
    world.records.step(1, {}, StepResponses(trained=[]))
    world.records.step(2, {}, responses())
    assert list(directory.rollouts.iterdir()) == []
    assert ("abba" in world.out.getvalue()) == bool(every_steps)


def test_an_event_carries_its_step_and_only_good_news_are_no_warnings(directory: RunDirectory) -> None:
    world = World(directory)
    world.records.note("resume", "goes on", folder="x")
    world.records.step(2, {}, StepResponses(trained=[]))
    world.records.warn("look")
    world.records.repair(Repair(kind=RepairKind.WORKER, where="rank 0", text="died", count=2))
    world.records.say("shown only")
    assert world.events() == [
        {"kind": "resume", "text": "goes on", "step": 0, "folder": "x"},
        {"kind": "warning", "text": "look", "step": 2},
        {"kind": "replacement", "text": "died", "step": 2, "repaired": RepairKind.WORKER.value, "count": 2},
    ]
    lines = world.out.getvalue().splitlines()
    assert any(line.endswith("resume: goes on") and "warning" not in line for line in lines)
    assert any("warning: look" in line for line in lines)
    assert any(line.endswith("shown only") for line in lines)


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("why"), "failed", "ValueError: why"),
        (PreemptedError("asked to stop"), "preempted", "PreemptedError: asked to stop"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt: "),
    ],
)
def test_an_error_is_the_recorded_end(error: BaseException, status: str, text: str, directory: RunDirectory) -> None:
    world = World(directory)
    world.records.step(5, {}, StepResponses(trained=[]))
    with pytest.raises(type(error)), world.records.open():
        raise error
    assert world.status() == (status, 5, 9, text)
    assert world.tracker.events[-1] == "closed"


def test_trackers_that_do_not_open_end_the_run(directory: RunDirectory) -> None:
    def refuse() -> list[Tracker]:
        raise CheckpointError("no tensorboard")

    world = World(directory)
    records = Records(directory, refuse, make_console(9, world.out), LogSection(), num_steps=9)
    with pytest.raises(CheckpointError), records.open():
        raise AssertionError("not reached")
    assert world.status() == ("failed", 0, 9, "CheckpointError: no tensorboard")


def test_a_full_disk_costs_a_record_and_says_so(directory: RunDirectory) -> None:
    world = World(directory)
    world.tracker.is_full = True
    with world.records.open():
        world.records.step(1, {}, responses())
        assert "warning: metrics: disk full; the run goes on without this record" in world.out.getvalue()
        assert world.status() == ("running", 1, 9, None)


def test_a_step_that_ends_after_the_run_does_not_hide_its_end(directory: RunDirectory) -> None:
    """The thread that watches Ray ends the run while the loop's own goes on for some milliseconds."""
    world = World(directory)
    with world.records.open():
        world.records.step(1, {}, responses())
        world.records.end(CheckpointError("lost"))
        world.records.step(2, {}, responses())
        assert world.status() == ("failed", 1, 9, "CheckpointError: lost")
