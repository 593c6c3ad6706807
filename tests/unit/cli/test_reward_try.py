"""`rlhf reward try`: a function on rows, with what it got, gave and took."""

from pathlib import Path

import pytest

from rlhf.cli.main import main

pytestmark = pytest.mark.timeout(60)

FUNCTION = """
import rlhf


def right(responses: list[str], answer: list[str]) -> list[dict[str, float]]:
    rlhf.log("seen", len(responses))
    return [{"score": float(text == one), "length": len(text)} for text, one in zip(responses, answer)]


def right_one(question, response, *, answer): return None


def broken(responses): return [1 / 0 for _ in responses]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "reward.py").write_text(FUNCTION)
    rows = "".join(f'{{"question": "{n} + 1?", "answer": "{n + 1}"}}\n' for n in range(5))
    (tmp_path / "sums.jsonl").write_text(rows)


def tried(*words: str) -> int:
    return main(["reward", "try", *words, "--data.path", "sums.jsonl"])


@pytest.mark.parametrize("name", ["mine.reward:right", "mine/reward.py:right", "./mine/reward.py:right"])
def test_rows_arguments_scores_and_time_are_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tried(name, "--num-rows", "2") == 0
    first, *lines, time, hint = capsys.readouterr().out.splitlines()
    assert first.startswith("mine.reward:right gets responses, answer = column answer (lists); imported in ")
    assert lines == [
        "row sums.jsonl:1",
        '  answer       "1"',
        '    "1" scores 1 (length 1)',
        '    "No." scores 0 (length 3)',
        "row sums.jsonl:2",
        '  answer       "2"',
        '    "2" scores 1 (length 1)',
        '    "No." scores 0 (length 3)',
        "logged: reward/seen 4",
    ]
    assert time.startswith("4 responses in ")
    assert hint == "in a run: --reward.function mine.reward:right --data.path sums.jsonl"


def test_responses_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert tried("mine.reward:right_one", "--num-rows", "1", "--responses", "one", "--responses", "\x1b[2J") == 0
    out = capsys.readouterr().out
    assert "(one response at a time)" in out
    assert '    "one" scores None\n    "\\x1b[2J" scores None\n' in out
    assert '  question     "0 + 1?"' in out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["mine/reward.py:absent"], 2, "mine.reward has no absent"),
        (["mine/other.py:right"], 2, "no such file: mine/other.py"),
        (["/etc/other.py:right"], 2, "no such file: /etc/other.py"),
        (["right"], 2, "need module:name or file.py:name"),
        ([], 2, "function: missing; name it"),
        (["mine.reward:broken"], 4, "reward.py:13 ZeroDivisionError: division by zero on sums.jsonl:1"),
    ],
)
def test_what_cannot_be_tried(words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tried(*words) == code
    assert said in capsys.readouterr().err


def test_a_file_outside_this_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["reward", "try", "../mine/reward.py:right", "--data.path", "../sums.jsonl"]) == 2
    assert f"Run this in {tmp_path / 'mine'}." in capsys.readouterr().err
