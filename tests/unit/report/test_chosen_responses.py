"""Which responses are on a page, and in which order."""

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from rlhf.errors import ConfigError
from rlhf.orchestrator.run.responses import StepResponses
from rlhf.report.chosen_responses import SHOWN_OF_TEXT, choose_responses
from rlhf.report.run_record import RunRecord, read_run
from rlhf.types import Json
from tests.unit.report.support import evaluation, group, make_run

BIG = 1 << 30


def run_with(folder: Path, responses: Mapping[int, StepResponses]) -> RunRecord:
    return read_run(make_run(folder, [], responses=responses))


def places(blocks: list[dict[str, Json]]) -> list[tuple[Json, Json, Json]]:
    return [(block["run"], block["kind"], block["step"]) for block in blocks]


def steps_of(count: int, texts: int = 2) -> dict[int, StepResponses]:
    return {s: StepResponses(trained=[group(0, ["r" * 100] * texts, [0.0] * texts)]) for s in range(1, count + 1)}


def test_a_group_is_sorted_by_reward_with_all_that_explains_it(tmp_path: Path) -> None:
    made = group(1, ["low", "none", "high"], [0.25, float("nan"), 1.0], prompt="2+2?")
    run = run_with(tmp_path / "a", {4: StepResponses(trained=[made, group(2, ["x"], [0.0])], advantages={"r1-2": 1.5})})
    (block,) = choose_responses([run], [], BIG)
    groups = block["groups"]
    assert isinstance(groups, list)
    assert block["num_groups"] == len(groups) == 2
    first = groups[0]
    assert isinstance(first, dict)
    rows = first.pop("rows")
    assert first == {"id": "p1", "prompt": "2+2?", "label": "b", "columns": {"level": "3"}}
    assert isinstance(rows, list)
    assert [row["text"] for row in rows if isinstance(row, dict)] == ["high", "low", "none"]
    explained = {"text": "high", "reward": 1.0, "parts": {"rule": 0.5}, "advantage": 1.5}
    assert rows[0] == {**explained, "stop": "stop", "tokens": 2, "version": 0}


def test_with_room_every_step_is_there_by_run_kind_and_step(tmp_path: Path) -> None:
    recorded = StepResponses(trained=[group(0, ["x"], [1.0])], evaluated=evaluation([1.0]).evaluated)
    runs = [run_with(tmp_path / name, {1: recorded, 2: recorded}) for name in "ab"]
    assert places(choose_responses(runs, [], BIG)) == [
        (run, kind, step) for run in (0, 1) for kind in ("rollouts", "evaluations") for step in (1, 2)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_without_room_the_first_middle_and_last_step_are_there(tmp_path: Path, count: int) -> None:
    run = run_with(tmp_path / "a", steps_of(count))
    found = [step for _, _, step in places(choose_responses([run], [], 0))]
    assert found == sorted({1, count // 2 + 1, count})


def test_what_room_is_left_is_spread_over_the_run(tmp_path: Path) -> None:
    run = run_with(tmp_path / "a", steps_of(100))
    size = (tmp_path / "a/rollouts/step_000001.jsonl").stat().st_size
    found = [int(str(step)) for _, _, step in places(choose_responses([run], [], 12 * size))]
    assert 8 <= len(found) <= 25
    gaps = [later - earlier for earlier, later in itertools.pairwise(found)]
    assert max(gaps) <= 26


def test_a_step_that_was_asked_for_is_whole_without_room(tmp_path: Path) -> None:
    many = StepResponses(trained=[group(i, ["r" * 100], [0.0]) for i in range(10)])
    run = run_with(tmp_path / "a", dict.fromkeys(range(1, 10), many))
    blocks = {block["step"]: block for block in choose_responses([run], [3], 0)}
    assert sorted(map(str, blocks)) == ["1", "3", "5", "9"]
    sizes = {step: len(json.dumps(block["groups"])) for step, block in blocks.items()}
    assert sizes[3] > 5 * sizes[1]
    assert {block["num_groups"] for block in blocks.values()} == {10}


def test_a_step_that_is_not_recorded_is_refused(tmp_path: Path) -> None:
    run = run_with(tmp_path / "a", steps_of(5))
    with pytest.raises(ConfigError, match=re.escape("steps: no run has responses of step 9; the nearest is 5.")):
        choose_responses([run], [2, 9], BIG)
    with pytest.raises(ConfigError, match="step 1; no responses are recorded"):
        choose_responses([run_with(tmp_path / "b", {})], [1], BIG)
    assert choose_responses([run_with(tmp_path / "c", {})], [], BIG) == []


def test_the_room_bounds_the_page_and_long_texts_are_cut(tmp_path: Path) -> None:
    run = run_with(tmp_path / "a", {s: StepResponses(trained=[group(0, ["é" * 50_000], [0.0])]) for s in range(1, 50)})
    blocks = choose_responses([run], [], 300_000)
    assert len(json.dumps(blocks, ensure_ascii=False).encode()) < 400_000
    assert len(blocks) > 3
    text = json.dumps(blocks[0], ensure_ascii=False)
    assert f"[{50_000 - SHOWN_OF_TEXT} more characters]" in text
