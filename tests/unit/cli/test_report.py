"""`rlhf report`, as a user types it."""

from pathlib import Path

import pytest

from rlhf.cli.main import main
from rlhf.orchestrator.run.run_directory import Status
from tests.unit.report.support import make_run


def test_one_run_gets_its_page_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "a", [{"eval/loss": 2.0}, {"eval/loss": 1.0}])
    assert main(["report", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Done: step 2 of 2. eval/loss fell from 2 to 1. Nothing is known to be wrong."
    assert lines[1] == f"report: {folder}/report.html (0.1 MiB)"
    assert (folder / "report.html").is_file()


def test_several_runs_get_one_page_here(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, loss in (("a", 2.0), ("b", 1.0)):
        make_run(tmp_path / name, [{"eval/loss": loss}])
    assert main(["report", "a", "b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("b is ahead: eval/loss 1 against 2 of a")
    assert [line[:3] for line in lines[1:3]] == ["a: ", "b: "]
    assert lines[3].startswith(f"report: {tmp_path}/report.html")


def test_mistakes_have_the_code_of_their_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "a", [])
    damaged = make_run(tmp_path / "damaged", [])
    (damaged / "status.json").write_text("[]")
    for words, code, text in (
        (["--out", "x"], 2, "missing; name the folder of a run"),
        (["nowhere"], 2, "nowhere: not the folder of a run"),
        ([str(tmp_path)], 2, "it holds runs. Name one of them: a, damaged"),
        ([str(damaged)], 3, "status.json: damaged"),
        ([str(folder), "--out", str(tmp_path / "no" / "x.html")], 2, "is not a folder"),
        ([str(folder), "--out", "/proc/x.html"], 5, "cannot be written"),
    ):
        assert main(["report", *words]) == code
        assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "target"),
    [
        ("logs/attempt_1/a.log", "/"),
        ("logs/attempt_1/a.trace.jsonl", "/"),
        ("logs/attempt_1/a.trace.jsonl", "/proc/self/mem"),
        ("rollouts/step_000001.jsonl", "/proc/self/mem"),
    ],
)
def test_a_file_that_cannot_be_read_has_the_code_of_data(
    tmp_path: Path, file: str, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "a", [{"time/step": 1.0}], status=Status.FAILED, error="RuntimeError: lost")
    (folder / file).symlink_to(target)
    assert main(["report", str(folder)]) == 3
    assert "cannot be read (I" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["metrics.jsonl", "events.jsonl", "rollouts/step_000001.jsonl"])
@pytest.mark.parametrize("content", ["", "\x00", "null\n", '{"step": 1e400}\n', '{"step": 1, "m": "x"}\n{"ste'])
def test_damaged_lines_do_not_stop_it(tmp_path: Path, file: str, content: str) -> None:
    folder = make_run(tmp_path / "a", [{"policy/loss": 1.0}])
    (folder / file).write_text(content)
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").is_file()
