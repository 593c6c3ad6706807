"""What a run repairs by itself: an event each time, a metric, and one line for each kind and place."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.config.run import LogSection
from rlhf.orchestrator.run.console import make_console
from rlhf.orchestrator.run.files import read_rows
from rlhf.orchestrator.run.records import Records
from rlhf.orchestrator.run.run_directory import RunDirectory
from rlhf.repair import Repair, RepairKind
from tests.unit.orchestrator.support import ppo_run


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def records(tmp_path: Path, out: io.StringIO) -> Iterator[Records]:
    with RunDirectory.open(tmp_path / "a", resume=False) as run:
        yield Records(run, list, make_console(3, out), LogSection(), num_steps=3)


def repair(kind: RepairKind, where: str, text: str, count: int = 1) -> Repair:
    return Repair(kind=kind, where=where, text=text, count=count)


def test_each_repair_is_an_event_and_counted_and_said_once(records: Records, out: io.StringIO) -> None:
    records.repair(repair(RepairKind.REWARD_REQUEST, "service", "no reply (status 503)", count=3))
    records.repair(repair(RepairKind.REWARD_REQUEST, "service", "no reply (refused)"))
    records.repair(repair(RepairKind.REWARD_REQUEST, "another", "no reply at all"))
    records.repair(repair(RepairKind.REWARD_PROCESS, "service", "took over 60 s"))
    events = read_rows(records.directory.events)
    assert [(event["kind"], event["repaired"], event["count"]) for event in events] == [
        ("repair", "reward request", 3),
        ("repair", "reward request", 1),
        ("repair", "reward request", 1),
        ("repair", "reward process", 1),
    ]
    assert [event["text"] for event in events][:2] == ["no reply (status 503)", "no reply (refused)"]
    said = [line for line in out.getvalue().splitlines() if "repair: " in line]
    assert len(said) == 3, out.getvalue()
    assert "refused" not in out.getvalue()
    assert records.take_repair_metrics() == {"repairs/count": 6.0}
    assert records.take_repair_metrics() == {"repairs/count": 0.0}


def test_every_replacement_and_restart_is_said(records: Records, out: io.StringIO) -> None:
    for kind in (RepairKind.WORKER, RepairKind.RESTART):
        for text in ("policy rank 0 (pid 1) died", "policy rank 0 (pid 2) died"):
            records.repair(repair(kind, text, text))
    assert [event["kind"] for event in read_rows(records.directory.events)] == ["replacement"] * 2 + ["restart"] * 2
    assert out.getvalue().count(" died") == 4
    assert records.take_repair_metrics() == {"repairs/count": 4.0}


def test_a_checkpoint_that_is_passed_over_is_an_event_of_the_run_that_continues(tmp_path: Path) -> None:
    run = ppo_run(tmp_path)
    run.num_steps, run.checkpoint_every = 2, 1
    run.run()
    file = run.path / "checkpoints" / "step_2" / "policy" / "engine.npz"
    file.write_bytes(file.read_bytes()[:-1])
    run = ppo_run(tmp_path)
    run.num_steps, run.checkpoint_every = 3, 1
    run.run(resume=True)
    (event,) = [row for row in read_rows(run.path / "events.jsonl") if row["kind"] == "repair"]
    assert event["repaired"] == "checkpoint"
    assert "step_2" in str(event["text"])
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["repairs/count"] for row in rows] == [0.0, 1.0, 0.0]
