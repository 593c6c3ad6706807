"""`rlhf sample` and `rlhf generate` with tools and environments, by a real model that calls a tool."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.cli.main import main
from rlhf.config.data import DataSection
from rlhf.engines.models.tokenizer import load_tokenizer
from tests.integration.agent_model import CALCULATOR, SUMS, make_caller
from tests.unit.orchestrator.data.data_support import load_demonstrations

LENGTHS = ("--max-prompt-tokens", "272", "--max-tokens", "200", "--engine", "transformers")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a model that calls the calculator, as a run with tools leaves it."""
    folder = tmp_path_factory.mktemp("agents")
    run = folder / "runs" / "adder"
    make_caller(run / "model")
    (run / "status.json").write_text("{}")
    config = {"rollout": {"tools": ["calculator:add"], "environment": [], "max_turns": 2, "batch_size": 4}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "calculator.py").write_text(CALCULATOR)
    rows = [{"prompt": f"{a}+{b}", "answer": f"{a + b}", "limit": 3} for a, b in SUMS]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


@pytest.fixture
def run(model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Works in the folder with the user's code."""
    monkeypatch.chdir(model.parents[1])
    return model


def sampled(run: Path, out: str, *arguments: str) -> list[dict[str, Any]]:
    given = ("sample", str(run), "--data.path", "sums.jsonl", "--data.eval-fraction", "0", "--num-samples", "12")
    assert main([*given, "--out", out, *LENGTHS, *arguments]) == 0
    return [json.loads(line) for line in Path(out).read_text().splitlines()]


def roles(row: Mapping[str, Any]) -> list[str]:
    return [message["role"] for message in row["episode"]["messages"]]


def test_samples_with_a_tool_hold_their_episodes_and_become_rows_to_train_on(run: Path) -> None:
    rows = sampled(run, "called.jsonl", "--rollout.tools", "calculator.py:add", "--reward.rules", "number")
    called = [row for row in rows if row["episode"]["ending"] == "answer" and row["episode"]["calls"] == {"add": 1}]
    assert len(called) > 6
    for row in called:
        assert roles(row) == ["assistant", "tool", "assistant"]
        answer = row["episode"]["messages"][-1]["content"]
        assert row["reward"] == float(answer == row["label"]), "rewards read the last turn"
        assert row["tools"][0]["function"]["name"] == "add"
    best = "best.jsonl"
    assert main(["curate", "rejection", "called.jsonl", "--threshold", "1", "--out", best]) == 0
    section = DataSection(path=best, eval_fraction=0.0, allow_control_tokens=True)
    tokenizer = load_tokenizer(str(run / "model"))
    groups = load_demonstrations(section, tokenizer).train
    first = next(group for group in groups if len(group.responses[0].token_ids) > 60)
    (response,) = first.responses
    assert response.loss_mask is not None
    learned = tokenizer.decode(response.token_ids[response.loss_mask].tolist(), skip_special_tokens=False)
    whole = tokenizer.decode(response.token_ids.tolist(), skip_special_tokens=False)
    assert "<s>tool\n" in whole
    assert "tool\n" not in learned


def test_an_environment_gives_the_reward_and_samples_go_on_where_they_stopped(run: Path) -> None:
    play = ("--rollout.environment", "calculator:Teacher", "--rollout.max-turns", "2", "--chunk-size", "1")
    rows = sampled(run, "played.jsonl", *play)
    assert all(row["reward"] == row["parts"]["environment"] == row["episode"]["reward"] for row in rows)
    assert {row["episode"]["ending"] for row in rows} == {"max_turns"}
    assert roles(rows[0]) == ["user", "assistant", "user", "assistant"]
    whole = Path("played.jsonl").read_bytes()
    Path("played.jsonl").write_bytes(b"".join(line + b"\n" for line in whole.splitlines()[:13]))
    assert sampled(run, "played.jsonl", *play) == rows
    assert Path("played.jsonl").read_bytes() == whole


def test_other_limits_are_other_samples(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = ("--rollout.tools", "calculator:add", "--max-prompts", "1")
    sampled(run, "limited.jsonl", *tool)
    given = ("sample", str(run), "--data.path", "sums.jsonl", "--data.eval-fraction", "0", "--num-samples", "12")
    assert main([*given, "--out", "limited.jsonl", *LENGTHS, *tool, "--rollout.max-turns", "1"]) == 2
    assert 'limited.jsonl was made with rollout {"tools": ["calculator:add"]}' in capsys.readouterr().err


def test_generate_has_the_tools_of_the_run_and_shows_turns(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(run), "--prompt", "5+3", "--num-samples", "8", *LENGTHS[2:]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("> ")
    assert '"name": "add"' in lines[0], "the template showed the tool"
    assert any(line.startswith("tool add: ") for line in lines)
    assert any(line.startswith("[answer; 2 turns, 1 call") for line in lines)
    assert main(["generate", str(run), "--prompt", "5+3", "--rollout.tools", "[]", *LENGTHS[2:]]) == 0
    assert '"name": "add"' not in capsys.readouterr().out


def test_generate_with_an_environment_needs_its_columns(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    play = ("--rollout.environment", "calculator.py:Teacher", "--rollout.tools", "[]")
    assert main(["generate", str(run), "--prompt", "5+3", *play, *LENGTHS[2:]]) == 3
    error = capsys.readouterr().err
    assert "row 0 has no limit, which calculator:Teacher.reset needs" in error
    assert "--prompts ROWS.jsonl" in error
    assert main(["generate", str(run), "--prompts", "sums.jsonl", *play, *LENGTHS[2:]]) == 0
    assert "user: say" in capsys.readouterr().out.splitlines()


def test_generate_elsewhere_says_whose_tools_are_missing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", str(run), "--prompt", "5+3"]) == 2
    error = capsys.readouterr().err
    assert "calculator:add: no module calculator in this folder" in error
    assert f"as in the run that trained {run}/model. Run this in the folder with its code" in error
