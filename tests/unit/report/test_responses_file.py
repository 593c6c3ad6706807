"""Reading recorded responses, also of older versions and damaged ones."""

import json
from pathlib import Path

import pytest

from rlhf.errors import DataError
from rlhf.orchestrator.run.responses import StepResponses
from rlhf.report.responses_file import read_responses, recorded_steps
from tests.unit.report.support import group, make_run


def test_responses_are_read_as_they_were_written(tmp_path: Path) -> None:
    recorded = StepResponses(
        trained=[group(1, ["x", "y"], [1.0, 0.0]), group(1, ["z"], [0.5])], advantages={"r1-1": -1}
    )
    folder = make_run(tmp_path / "a", [], responses={7: recorded, 12: recorded})
    steps = recorded_steps(folder / "rollouts")
    assert [*steps] == [7, 12]
    rows = read_responses(steps[12])
    assert [(row.group, row.response, row.reward) for row in rows] == [(0, "x", 1.0), (0, "y", 0.0), (1, "z", 0.5)]
    assert (rows[1].advantage, rows[0].advantage) == (-1, None)
    assert rows[1].label == "b"
    assert rows[1].columns == {"level": 3}
    assert rows[0].parts == {"rule": 0.5}
    assert (rows[0].finish_reason, rows[0].num_tokens, rows[0].weight_version) == ("stop", 2, 0)


def test_rows_of_older_versions_get_the_groups_of_their_prompts(tmp_path: Path) -> None:
    file = tmp_path / "step_000001.jsonl"
    rows = [{"prompt_id": name, "response": "r", "reward": 1} for name in ("a", "a", "b", "a")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.group for row in read_responses(file)] == [0, 0, 1, 2]


def test_values_of_the_wrong_kind_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "step_000001.jsonl"
    row = {"response": 3, "reward": "high", "parts": [1], "columns": None, "label": ["x"], "num_tokens": 1.5}
    file.write_text(json.dumps(row) + '\n{"response": "cut o')
    (read,) = read_responses(file)
    assert (read.response, read.reward, read.parts, read.columns, read.label) == ("3", None, {}, {}, "['x']")
    assert (read.num_tokens, read.advantage, read.finish_reason) == (None, None, "")


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    assert recorded_steps(tmp_path / "none") == {}
    file = tmp_path / "step_000001.jsonl"
    file.symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"step_000001\.jsonl: cannot be read"):
        read_responses(file)
