"""What is said of a run, for runs whose story is known."""

from pathlib import Path

import pytest

from rlhf.orchestrator.run.diagnosis import diagnose
from rlhf.orchestrator.run.files import append_json
from rlhf.orchestrator.run.run_directory import Status
from rlhf.report.run_record import read_run
from rlhf.report.verdict import Verdict, judge, movement
from tests.unit.report.support import make_run

RISING = [{"reward/mean_all": step / 50, "kl/ref_per_response": 0.5} for step in range(50)]


def verdict_of(folder: Path) -> Verdict:
    return judge(read_run(folder), diagnose(folder))


def test_a_run_that_went_well(tmp_path: Path) -> None:
    assert verdict_of(make_run(tmp_path / "a", RISING)).line == (
        "Done: step 50 of 50. reward/mean_all rose from 0.09 to 0.89; kl/ref_per_response stayed at 0.5. "
        "Nothing is known to be wrong."
    )


def test_a_run_that_failed_says_why_and_what_to_do(tmp_path: Path) -> None:
    error = "NumericsError: 50 steps made no update"
    found = verdict_of(make_run(tmp_path / "a", RISING, status=Status.FAILED, error=error))
    assert found.ended == "Failed: step 50 of 50"
    assert found.wrong[0] == error
    assert found.wrong[1].startswith("See events.jsonl")
    assert found.line.endswith(f"Wrong: {error} (and 1 more).")


def test_warnings_are_told_once_and_resumes_are_no_trouble(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", RISING)
    for step in range(5):
        append_json(folder / "events.jsonl", {"kind": "warning", "text": "all\nadvantages were 0.", "step": step})
    append_json(folder / "events.jsonl", {"kind": "unmoved", "text": "policy: " + "x" * 1000, "step": 1})
    found = verdict_of(folder)
    assert found.wrong[1] == "all advantages were 0 (5 times)"
    assert len(found.wrong) == 2
    assert len(found.wrong[0]) < 250


def test_causes_of_the_last_steps_are_told_and_those_of_the_first_are_not(tmp_path: Path) -> None:
    rows = [{"reward/mean_all": 0.0, "response/truncated": 1.0, "response/length": 8.0}] * 12
    folder = make_run(tmp_path / "a", rows)
    append_json(folder / "events.jsonl", {"kind": "diagnosis", "text": "after step 1: no format", "step": 1})
    found = verdict_of(folder)
    causes = diagnose(folder).causes
    assert causes
    assert found.wrong == tuple(cause.rstrip(".") for cause in causes)


def test_a_run_without_a_step(tmp_path: Path) -> None:
    found = verdict_of(make_run(tmp_path / "a", []))
    assert found.moved == ()
    assert found.line.startswith("Done: step 0 of 0. no metric has two values to compare")


def test_what_could_not_be_read_is_told(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", RISING)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 51,')
    assert "1 of 51 lines cannot be read" in verdict_of(folder).wrong[0]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([1.0], None),
        ([1.0, 2.0], "m went from 1 to 2 (one step each: too few to tell it from noise)"),
        ([0.0] * 20 + [1.0] * 20, "m rose from 0 to 1"),
        ([1.0] * 20 + [0.0] * 20, "m fell from 1 to 0"),
        ([2.0, 2.0], "m stayed at 2"),
        ([0.0, 1.0] * 30 + [1.0], "m did not move beyond its noise (0.5 at first, 0.5833 at the end)"),
    ],
)
def test_movements(values: list[float], sentence: str | None) -> None:
    assert movement("m", [*enumerate(values, 1)]) == sentence


def test_evaluations_are_compared_one_by_one() -> None:
    assert movement("eval/reward", [(1, 1.0), (2, 2.0)]) == "eval/reward rose from 1 to 2"
