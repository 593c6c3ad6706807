"""What the report says of data sets whose every fact is known."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli.main import main
from rlhf.types import Json
from tests.unit.orchestrator.data.data_support import write_rows


def report(capsys: pytest.CaptureFixture[str], kind: str, path: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    assert main(["data", kind, "--data.path", str(path), "--json", *arguments]) == code
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def test_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Json] = [
        {"prompt": "p", "chosen": "long", "rejected": "b"},
        {"prompt": "p", "chosen": "b", "rejected": "long"},
        {"prompt": "q", "chosen": "A b!", "rejected": "a  b"},
        {"prompt": "q", "chosen": "A b!", "rejected": "a  b"},
        {"prompt": " Q.", "chosen": "a b", "rejected": "A B?"},
        {"prompt": "r", "chosen": "longest", "rejected": "z"},
    ]
    said = report(capsys, "preferences", write_rows(tmp_path / "t.jsonl", rows))
    assert said["wrong"] == {}
    train = said["train"]
    assert (train["rows"], train["prompts"], train["repeated"], train["nearly_repeated"]) == (6, 4, 1, 1)
    assert train["pairs"] == {
        "nearly_the_same": 3, "contradictory": 1, "same_when_cut": 0,
        "chosen_longer": pytest.approx(2 / 6), "equally_long": pytest.approx(2 / 6),
        "mean_difference": pytest.approx((3 - 3 + 0 + 0 - 1 + 6) / 6),
    }  # fmt: skip
    assert said["warnings"] == [
        "pairs that are there in both orders: 1.",
        "rows that repeat another one: 1. Each weighs twice.",
    ]


@pytest.mark.parametrize(
    ("kind", "row", "columns"),
    [
        ("prompts", {"question": "q", "answer": "5", "level": 1}, {"prompt": "question", "label": "answer"}),
        ("prompts", {"prompt": "q"}, {"prompt": "prompt"}),
        ("demonstrations", {"question": "q", "answer": "5"}, {"prompt": "question", "responses": "answer"}),
        (
            "preferences",
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            {"prompt": "prompt", "responses": "chosen, rejected"},
        ),
        (
            "labeled",
            {"prompt": "q", "completion": "a", "label": True},
            {"prompt": "prompt", "responses": "completion", "label": "label"},
        ),
    ],
)  # fmt: skip
def test_columns_are_named_by_what_they_are_read_as(
    kind: str, row: dict[str, Json], columns: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "t.jsonl", [row, {**row, "label": False}] if kind == "labeled" else [row])
    assert report(capsys, kind, path)["columns"] == columns
    assert main(["data", kind, "--data.path", str(path)]) == 0
    said = ", ".join(f"{what} = {name}" for what, name in columns.items())
    assert f"columns: {said}\n" in capsys.readouterr().out


def test_length_bias_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Json] = [{"prompt": f"p{n}", "chosen": "long " * n, "rejected": "b"} for n in range(2, 12)]
    said = report(capsys, "preferences", write_rows(tmp_path / "t.jsonl", rows))
    assert said["warnings"] == ["the better response is the longer one in 100% of pairs: length may be what is taught."]


def test_wrong_rows_are_counted_by_reason_and_refused_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Json] = [
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "c", "rejected": " "},
        {"prompt": "p", "chosen": "d", "rejected": "d"},
    ]
    path = write_rows(tmp_path / "t.jsonl", rows)
    wrong = {
        "chosen and rejected are the same.": {"rows": 2, "first": "t.jsonl:1"},
        "rejected is empty.": {"rows": 1, "first": "t.jsonl:3"},
    }
    assert report(capsys, "preferences", path, code=3)["wrong"] == wrong
    assert report(capsys, "preferences", path, "--data.max-bad-rows", "3")["wrong"] == wrong


def test_held_out_rows_that_are_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write_rows(tmp_path / "t.jsonl", [{"prompt": p, "response": r} for p, r in (("A b", "x"), ("c", "y"))])
    held_out = write_rows(
        tmp_path / "h.jsonl", [{"prompt": p, "response": r} for p, r in (("a, B", "z"), ("c", "Y!"), ("d", "y"))]
    )
    said = report(capsys, "demonstrations", train, "--data.eval-path", str(held_out))
    assert said["on_both_sides"] == {"prompts": 1, "prompts_nearly": 2, "responses": 1, "responses_nearly": 2}
    assert (said["train"]["rows"], said["held_out"]["rows"]) == (2, 3)
    assert said["warnings"] == [
        "2 held-out rows have a prompt that is trained on: what is measured on them says too much."
    ]


@pytest.mark.parametrize(
    ("good", "bad", "advice"),
    [
        (4, 4, None),
        (4, 3, None),
        (3, 4, "Weigh the desirable ones by 1.33 to 1.78."),
        (1, 9, "Weigh the desirable ones by 9 to 12."),
        (8, 2, "Weigh the undesirable ones by 3 to 4."),
    ],
)
def test_the_balance_of_labels_is_judged_as_kto_wants_it(
    good: int, bad: int, advice: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[Json] = [{"prompt": "p", "completion": f"{n}", "label": n < good} for n in range(good + bad)]
    rows.append({"prompt": "q", "completion": "both", "label": True})
    rows.append({"prompt": "q", "completion": "both", "label": False})
    rows = rows if advice is None or good + bad < 3 else rows[:-2]
    said = report(capsys, "labeled", write_rows(tmp_path / "t.jsonl", rows))
    labels = said["train"]["labels"]
    extra = len(rows) - good - bad
    assert labels == {"desirable": good + extra // 2, "undesirable": bad + extra // 2, "contradictory": extra // 2}
    lines = [line for line in said["warnings"] if "KTO" in line]
    assert [line.rpartition(". ")[2] for line in lines] == ([] if advice is None else [advice])


def test_pairs_read_as_labels_and_steps_have_their_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write_rows(tmp_path / "t.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "bb"}])
    assert report(capsys, "labeled", pairs)["train"]["pairs"]
    steps: list[Json] = [
        {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]},
        {"prompt": "p", "completions": ["a"], "labels": [True]},
    ]
    said = report(capsys, "steps", write_rows(tmp_path / "s.jsonl", steps))
    assert said["train"]["steps"] == {
        "steps": 3, "mean_per_response": 1.5, "mean_label": pytest.approx(2 / 3), "responses_without_a_bad_step": 1,
    }  # fmt: skip


def test_lengths_are_percentiles_of_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Json] = [{"prompt": "x" * n} for n in range(1, 102)]
    said = report(capsys, "prompts", write_rows(tmp_path / "t.jsonl", rows))
    assert said["unit"] == "characters"
    assert said["train"]["lengths"] == {
        "prompt": {"p5": 6.0, "p50": 51.0, "p95": 96.0, "p99": 100.0, "max": 101, "mean": 51.0}
    }


def test_texts_are_divided_by_their_own_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"text": f"once upon {n}"} for n in range(4)])
    said = report(capsys, "texts", path, "--data.eval-fraction", "0.25")
    assert (said["train"]["rows"], said["held_out"]["rows"]) == (3, 1)


def test_the_report_is_shown_as_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Json] = [{"prompt": f"p{n}", "chosen": "[bold]long", "rejected": "b"} for n in range(10)]
    path = write_rows(tmp_path / "t.jsonl", rows)
    assert main(["data", "preferences", "--data.path", str(path), "--data.eval-fraction", "0.2"]) == 0
    said = capsys.readouterr().out
    for part in (
        "pairs: chosen longer",
        "also trained on: responses",
        "held out: prompt and answer",
        "note: the better",
    ):
        assert part in said


def test_wrong_arguments_get_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "promts"]) == 2
    need = "must be one of prompts, demonstrations, preferences, labeled, steps, texts"
    assert capsys.readouterr().err.splitlines() == [
        f'rlhf: error: --kind: {need} (got "promts"). Did you mean prompts?',
        "rlhf: error: data.path: missing; name a file, a folder or a hub data set.",
    ]
