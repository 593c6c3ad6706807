"""`rlhf compare`, as a user types it."""

import json
from pathlib import Path

import pytest

from rlhf.cli.main import main
from tests.unit.report.support import make_run


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    made = []
    for name, gain in (("first", 0.0), ("second", 0.5)):
        rows = [{"reward/mean_all": step / 100 + gain, "kl/ref_per_response": 0.1 * step} for step in range(50)]
        config = f"run: {{name: {name}}}\nalgo: {{kl: {{coef: {gain}}}}}\n"
        made.append(str(make_run(tmp_path / name, rows, config=config)))
    return made


def test_the_table_and_the_winner(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *runs]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    row = next(line for line in lines if "reward/mean_all" in line and "│" in line)
    assert "0.445 (0.49 at 50)" in row
    assert "0.945 (0.99 at 50)" in row
    assert any("algo.kl.coef" in line and "0.0" in line and "0.5" in line for line in lines)
    assert not any("run.name" in line for line in lines)
    assert lines[-1] == (
        "second is ahead: reward/mean_all 0.945 against 0.445 of first: 0.5 ± 0.014 better (mean of the last 10 steps)."
    )


def test_asked_metrics_and_json(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *runs, "--json", "--metrics", "kl/ref_per_response"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [[*run["metrics"]] for run in found["runs"]] == [["kl/ref_per_response"]] * 2
    assert found["result"]["winner"] == runs[1]
    assert found["result"]["is_clear"] is True
    assert found["settings"] == {"algo.kl.coef": [0.0, 0.5]}


def test_mistakes_have_the_code_of_their_kind(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = str(make_run(tmp_path / "empty", []))
    damaged = make_run(tmp_path / "damaged", [])
    (damaged / "status.json").write_text("{")
    for words, code, text in (
        (["x", "y"], 2, "x: not the folder of a run: no such folder"),
        (["x", "y"], 2, "y: not the folder of a run: no such folder"),
        (runs[:1], 2, "need the folders of two runs or more (got 1)"),
        ([*runs, "--metrics", "reward/mean"], 2, "no run has reward/mean. Did you mean reward/mean_all?"),
        ([empty, empty], 3, "none of the runs has finished a step"),
        ([runs[0], str(damaged)], 3, "status.json: damaged"),
        ([*runs, "--best"], 2, "--best"),
    ):
        assert main(["compare", *words]) == code
        assert text in capsys.readouterr().err


def test_a_line_that_was_cut_off_is_a_warning(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with (Path(runs[0]) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 51, "rew')
    assert main(["compare", *runs]) == 0
    shown = capsys.readouterr()
    assert "rlhf: warning: " in shown.err
    assert "metrics.jsonl: 1 of 51 lines cannot be read" in shown.err
    assert "second is ahead" in shown.out


def test_names_cannot_write_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [str(make_run(tmp_path / f"x\x1b[31m{i}", [{"eval/loss": 1.0 + i}])) for i in (0, 1)]
    assert main(["compare", *made]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [
        str(make_run(tmp_path / parent / "ppo", [{"eval/loss": loss}])) for parent, loss in (("a", 2.0), ("b", 1.0))
    ]
    assert main(["compare", *made]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("b/ppo is ahead: eval/loss 1 against 2 of a/ppo")
