"""The bars of a step, from hand-made times."""

import json
from pathlib import Path

import pytest

from rlhf.report import timeline
from rlhf.report.run_record import read_run
from rlhf.report.timeline import merged, phase_rows, timelines
from tests.unit.report.support import make_run


def test_phases_follow_each_other_and_the_rest_is_named() -> None:
    row = {"time/learn": 2.0, "time/wait": 3.0, "time/record": 0.5, "time/step": 7.0, "time": 1e9}
    assert phase_rows(row) == [
        ("trainer", [("record", 0.0, 0.5), ("wait", 0.5, 3.5), ("learn", 3.5, 5.5), ("other", 5.5, 7.0)])
    ]


def test_rollouts_are_made_while_the_trainer_waits_or_beside_it() -> None:
    row = {"time/wait": 3.0, "time/record": 0.5, "time/generate": 2.0, "time/score": 1.0, "time/step": 4.0}
    assert phase_rows(row)[1] == ("rollouts", [("generate", 0.5, 2.5), ("score", 2.5, 3.5)])
    name, bars = phase_rows({**row, "time/wait": 0.1})[1]
    assert name == "rollouts (beside training; start not recorded)"
    assert bars == [("generate", 0.0, 2.0), ("score", 2.0, 3.0)]


def test_short_calls_in_a_row_are_one_bar() -> None:
    bars = [("a", 0.0, 1.0), ("a", 1.05, 2.0), ("b", 2.0, 3.0), ("a", 3.0, 4.0), ("a", 4.2, 5.0)]
    assert merged(bars, 0.1) == [("a", 0.0, 2.0), ("b", 2.0, 3.0), ("a", 3.0, 4.0), ("a", 4.2, 5.0)]


def test_workers_are_shown_with_their_calls_of_that_step(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [])
    times = {1: 100.0, 2: 110.0}
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "time": end, "time/step": 10.0}) + "\n" for step, end in times.items())
    )
    logs = folder / "logs/attempt_1"
    calls = [("early", 80.0, 95.0), ("within", 101.0, 103.0), ("late", 109.0, 120.0), ("after", 111.0, 112.0)]
    lines = [json.dumps({"call": name, "start": start, "end": end}) for name, start, end in calls]
    logs.joinpath("policy_rank_0.trace.jsonl").write_text("\n".join([*lines, "[1]", '{"call": "torn', "{}"]))
    first, second = timelines(read_run(folder), [])
    rows = second["rows"]
    assert isinstance(rows, list)
    assert rows[1] == {"name": "policy_rank_0", "bars": [["within", 1.0, 3.0], ["late", 9.0, 10.0]]}
    assert first["rows"] == [
        {"name": "trainer", "bars": [["other", 0.0, 10.0]]},
        {"name": "policy_rank_0", "bars": [["early", 0.0, 5.0]]},
    ]


def test_only_the_end_of_long_traces_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "a", [])
    (folder / "metrics.jsonl").write_text('{"step": 1, "time": 110.0, "time/step": 10.0}\n')
    lines = [json.dumps({"call": f"call {i}", "start": 100.0 + i, "end": 100.5 + i}) for i in range(10)]
    for worker in ("a", "b"):
        (folder / f"logs/attempt_1/{worker}.trace.jsonl").write_text("".join(line + "\n" for line in lines))
    monkeypatch.setattr(timeline, "READ_OF_TRACES", 2 * (3 * len(lines[0]) + 10))
    (found,) = timelines(read_run(folder), [])
    rows = found["rows"]
    assert isinstance(rows, list)
    for row in rows[1:]:
        assert isinstance(row, dict)
        assert row["bars"] == [[f"call {i}", float(i), i + 0.5] for i in (7, 8, 9)]


def test_the_first_middle_last_slowest_and_chosen_steps_are_there(tmp_path: Path) -> None:
    rows = [{"time/step": 9.0 if step in (12, 13, 14) else 1.0} for step in range(1, 101)]
    found = timelines(read_run(make_run(tmp_path / "a", rows)), [30, 1000])
    assert [line["step"] for line in found] == [1, 12, 13, 14, 30, 51, 100]
    assert [line["step"] for line in found if line["is_slow"]] == [12, 13, 14]
    assert timelines(read_run(make_run(tmp_path / "b", [{"policy/loss": 1.0}])), []) == []


@pytest.mark.parametrize("value", [None, -1.0, 0.0])
def test_a_step_without_lengths_has_no_bars(value: float | None) -> None:
    assert phase_rows({"time/step": value}) == [("trainer", [])]
