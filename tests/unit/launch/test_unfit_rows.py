"""Labels that no answer can equal are refused before anything starts, by the row."""

from pathlib import Path

import pytest

from rlhf.config.commands import RowKind
from rlhf.config.data import DataSection
from rlhf.config.reward import CodeSource, ExactMatchSource, LengthSource, MathSource, Source
from rlhf.launch.unfit_rows import unfit_rows
from rlhf.orchestrator.data import check_rows
from rlhf.types import Json
from tests.unit.orchestrator.data.data_support import section, write_rows


def unfit(path: Path, sources: list[Source], rows: list[dict[str, Json]], **keys: object) -> list[str]:
    data: DataSection = section(write_rows(path / "t.jsonl", rows), **keys)
    records = check_rows(data, RowKind.PROMPTS).records
    return unfit_rows(data, sources, ((record.id, record.label, record.metadata) for record in records))


@pytest.mark.parametrize("label", ["Paris", ["Paris"], [["Paris"]], 2, 2.0, [2.0], 0.5, True, "[1, 2]"])
def test_a_label_of_one_value_is_compared(tmp_path: Path, label: Json) -> None:
    assert unfit(tmp_path, [ExactMatchSource()], [{"prompt": "a", "label": label}]) == []


@pytest.mark.parametrize(
    ("label", "what"),
    [
        (["Paris", "Rom"], 'a list of 2 values (["Paris", "Rom"])'),
        ([["a", 1.5]], 'a list of 2 values (["a", 1.5])'),
        ([], "a list of 0 values ([])"),
        ({"text": "é"}, 'an object ({"text": "é"})'),
        (["x" * 100], None),
        (["x" * 50, "y" * 50], f'a list of 2 values (["{"x" * 50}", "yyyy...)'),
    ],
)
def test_a_label_of_several_values_is_refused_by_its_row(tmp_path: Path, label: Json, what: str | None) -> None:
    lines = unfit(tmp_path, [MathSource(), ExactMatchSource(name="same")], [{"prompt": "a", "ground_truth": label}])
    expected = f"data: row t.jsonl:1 has a label that is {what}, need one text or number (reward math, same)."
    assert lines == ([] if what is None else [expected])


def test_the_column_of_the_config_is_the_one_that_counts(tmp_path: Path) -> None:
    row: dict[str, Json] = {"prompt": "a", "label": ["x", "y"], "gold": "z"}
    assert unfit(tmp_path, [ExactMatchSource()], [row], label_key="gold") == []
    assert len(unfit(tmp_path, [ExactMatchSource()], [row])) == 1


def test_rewards_that_compare_nothing_take_any_label(tmp_path: Path) -> None:
    assert unfit(tmp_path, [LengthSource(limit=3)], [{"prompt": "a", "label": ["x", "y"]}]) == []
    tests: Json = ["assert f(1) == 1", "assert f(2) == 2"]
    assert unfit(tmp_path, [CodeSource(sandbox="subprocess")], [{"prompt": "a", "label": tests}]) == []


def test_only_the_first_rows_are_listed(tmp_path: Path) -> None:
    lines = unfit(tmp_path, [ExactMatchSource()], [{"prompt": str(n), "label": ["x", "y"]} for n in range(8)])
    assert [line.split(" has ")[0] for line in lines[:5]] == [f"data: row t.jsonl:{n}" for n in range(1, 6)]
    assert lines[5:] == ["data: 3 more rows like these."]


def test_a_row_without_a_label_is_still_named(tmp_path: Path) -> None:
    (line,) = unfit(tmp_path, [ExactMatchSource()], [{"prompt": "a", "label": [None]}])
    assert line.startswith("data: row t.jsonl:1 has no label")
