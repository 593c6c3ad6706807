"""A function or class of the user's own, by its module or by its file."""

from pathlib import Path

import pytest

from rlhf.config.import_name import import_name


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    for file in ("rewards.py", "mine/math.py", "my-rewards.py", "two words/math.py", "../outside.py"):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    ("given", "imported"),
    [
        ("rewards:score", "rewards:score"),
        ("mine.math:Reward.score", "mine.math:Reward.score"),
        ("rewards.py:score", "rewards:score"),
        ("./rewards.py:score", "rewards:score"),
        ("mine/math.py:score", "mine.math:score"),
        ("mine/../rewards.py:score", "rewards:score"),
    ],
)
def test_a_file_is_the_module_that_it_is_for_other_processes(given: str, imported: str) -> None:
    assert import_name(given) == imported


def test_a_file_by_its_whole_path(here: Path) -> None:
    assert import_name(f"{here}/mine/math.py:score") == "mine.math:score"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("rewards", r"need module:name or file\.py:name \(got \"rewards\"\)"),
        ("rewards.py", r"need module:name or file\.py:name"),
        ("rewards.py:", r"need module:name or file\.py:name"),
        ("rewards.py:1", r"need module:name or file\.py:name"),
        ("absent.py:score", r"no such file: absent\.py \(in .*work\)"),
        ("../outside.py:score", r"outside\.py is not below this folder, .*work\. Run this in .*\."),
        ("my-rewards.py:score", r'"my-rewards" in my-rewards\.py is no name that Python can import\. Rename it\.'),
        ("two words/math.py:score", r'"two words" in two words/math\.py is no name'),
    ],
)
def test_what_no_process_could_import(given: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        import_name(given)
