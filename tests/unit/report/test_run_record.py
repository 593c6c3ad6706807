"""Reading the folders of runs, also damaged ones."""

import json
import re
from pathlib import Path

import pytest

from rlhf.errors import ConfigError, DataError
from rlhf.report.run_record import number, read_run
from tests.unit.report.support import make_run


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "a", [{"policy/loss": 2.0}, {"policy/loss": 1.0, "eval/loss": 3.0}]))
    assert run.name == "a"
    assert run.last_step == 2
    assert run.series("policy/loss") == [(1, 2.0), (2, 1.0)]
    assert run.series("eval/loss") == [(2, 3.0)]
    assert run.metrics == ["eval/loss", "policy/loss"]
    assert run.status["status"] == "done"
    assert run.events[0]["kind"] == "resume"
    assert run.config["train.batch_size"] == 64
    assert run.notes == ()


def test_half_a_line_is_left_out_and_said(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [{"policy/loss": 2.0}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": "two"}\n[1]\n' + "[" * 100_000 + '\n{"step": 2, "policy/lo')
    run = read_run(folder)
    assert run.last_step == 1
    assert run.notes == (f"{folder}/metrics.jsonl: 4 of 5 lines cannot be read (cut off or damaged) and are left out",)


def test_a_step_that_was_written_twice_counts_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [{"policy/loss": 2.0}, {"policy/loss": 1.0}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, "policy/loss": 4.0}) + "\n")
    run = read_run(folder)
    assert run.series("policy/loss") == [(1, 4.0), (2, 1.0)]
    assert run.notes == ()


@pytest.mark.parametrize("value", [None, True, "1", [1], float("nan"), float("inf"), 10**400])
def test_only_finite_numbers_are_values(value: object) -> None:
    assert number(value) is None  # type: ignore[arg-type]
    assert number(3) == 3.0


def test_what_is_no_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs/a", [])
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for folder, text in (
        ("a", "a: not the folder of a run: no such folder. Did you mean runs/a?"),
        ("b", "b: not the folder of a run: no such folder."),
        ("file", "file: not the folder of a run: a file."),
        ("empty", "empty: not the folder of a run: it has no status.json."),
        ("runs", "runs: not the folder of a run: it holds runs. Name one of them: a."),
    ):
        with pytest.raises(ConfigError, match=f"^{re.escape(text)}$") as caught:
            read_run(Path(folder))
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"status": 1}', "[" * 100_000])
def test_a_damaged_status_is_an_error_of_the_files(tmp_path: Path, content: str) -> None:
    folder = make_run(tmp_path / "a", [])
    (folder / "status.json").write_text(content)
    with pytest.raises(DataError, match=r"status\.json: damaged: need a JSON object with a status"):
        read_run(folder)


@pytest.mark.parametrize(("content", "note"), [("a: [", "not YAML"), ("[" * 10_000, "not YAML"), (None, "missing")])
def test_a_run_without_a_readable_config_is_read(tmp_path: Path, content: str | None, note: str) -> None:
    folder = make_run(tmp_path / "a", [{"policy/loss": 2.0}])
    if content is None:
        (folder / "config.yaml").unlink()
    else:
        (folder / "config.yaml").write_text(content)
    run = read_run(folder)
    assert run.config == {}
    assert run.notes == (f"{folder}/config.yaml: {note}, so settings are not shown",)


def test_a_file_that_cannot_be_opened_is_an_error_of_the_files(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", [])
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").mkdir()
    with pytest.raises(DataError, match=r"config\.yaml: cannot be read \(Is a directory\)"):
        read_run(folder)
