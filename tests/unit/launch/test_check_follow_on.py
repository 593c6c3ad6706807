"""One mistake is one line: what a default in the place of a wrong value would mean is not said."""

from pathlib import Path

import pytest

from rlhf.cli.main import main
from tests.tiny_models import make_policy


def test_a_wrong_batch_size_is_not_compared_with_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n' * 8)
    run = ["check", "grpo", "--policy.model", "org/model", "--data.path", "rows.jsonl"]
    assert main([*run, "--reward.rules", "length", "--rollout.batch-size", "x"]) == 2
    assert capsys.readouterr().err == 'rlhf: error: --rollout.batch-size: must be a whole number (got "x").\n'
    assert main([*run, "--reward.rules", "length,exact-match,wrong", "--rollout.batch-size", "8"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rlhf: error: --reward.rules.2: must be one of")


def test_all_wrong_rows_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": 1}\n' * 45)
    assert (
        main(["check", "grpo", "--policy.model", "o/m", "--data.path", "rows.jsonl", "--reward.rules", "length"]) == 3
    )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20
    assert lines[18] == "rlhf: error: rows.jsonl:19: prompt is not text (got int)."
    assert lines[19] == "rlhf: error: rows.jsonl: 26 more rows are wrong."


def test_rows_are_not_compared_with_a_size_that_is_in_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also once the rows are tokenized, and where the size was given under another name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 4)
    make_policy(tmp_path / "model")
    capsys.readouterr()
    run = ["check", "sft", "--policy.model", "model", "--data.path", "rows.jsonl", "--data.max-tokens", "8"]
    assert main([*run, "--train.batch-size", "2.5"]) == 2
    assert capsys.readouterr().err == "rlhf: error: --train.batch-size: must be a whole number (got 2.5).\n"
    assert main([*run, "data.train_batch_size=8"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("data.train_batch_size=8: unexpected argument. Did you mean --train.batch-size?")
    assert main(run) == 3
    assert "4 rows < train.batch_size 64" in capsys.readouterr().err
