"""Every command that loads a model refuses one that cannot be used, before anything starts, with the file and the
reason."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf.cli.main import main
from rlhf.launch import train
from tests.bad_models import BAD_MODELS, edit_weights, spoil
from tests.tiny_models import make_family, make_policy

SFT = ("--policy.model", "model", "--data.path", "rows.jsonl", "--data.max-tokens", "64", "--data.template", "plain")
ONE_STEP = ("--train.batch-size", "8", "--train.num-steps", "1")
COMMANDS: dict[str, Sequence[str]] = {
    "train": ("train", "sft", *SFT, *ONE_STEP),
    "generate": ("generate", "model", "--prompt", "a", "--engine", "transformers", "--max-tokens", "2"),
    "sample": (
        *("sample", "--model", "model", "--data.path", "rows.jsonl", "--out", "samples.jsonl", "--max-tokens", "2"),
        *("--max-prompt-tokens", "32", "--engine", "transformers"),
    ),
    "bench": ("bench", "sync", "--policy.model", "model"),
}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model and rows; nothing starts a cluster."""
    monkeypatch.chdir(tmp_path)
    make_policy(tmp_path / "model")
    rows = [{"prompt": f"q{n}", "response": f"a{n}"} for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def refuse(*_: object) -> None:
        pytest.fail("a cluster would have been started")

    monkeypatch.setattr(train, "open_cluster", refuse)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "command"),
    [
        (name, command)
        for name in BAD_MODELS
        for command in COMMANDS
        if command in ("train", "generate") or name in ("missing", "tokens", "lost shard")
    ],
)
def test_a_bad_model_is_refused(name: str, command: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, said = BAD_MODELS[name]
    damage(world / "model")
    code = main(COMMANDS[command])
    lines = capsys.readouterr().err
    assert code == 3, lines
    assert said in lines
    assert "internal" not in lines


@pytest.mark.parametrize("command", ["generate", "sample"])
def test_weights_that_are_not_finite_are_refused(command: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_weights(spoil)(world / "model")
    assert main(COMMANDS[command]) == 3
    assert "mlp.up_proj.weight in model.safetensors holds values that are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_typo_in_the_targets_of_adapters_is_refused(
    family: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if family != "llama":
        make_family(world / "model", family)
    code = main([*COMMANDS["train"], "--policy.lora.rank", "4", "--policy.lora.targets", "q_prj"])
    assert code == 3
    assert "policy.lora.targets: no linear layers called q_prj; have " in capsys.readouterr().err
    assert main([*COMMANDS["bench"], "--policy.lora.rank", "4", "--policy.lora.targets", "q_prj"]) == 3
    code = main(["check", "sft", *SFT, *ONE_STEP, "--policy.lora.rank", "4", "--policy.lora.targets", "q_prj"])
    assert code == 3


@pytest.mark.parametrize("name", [name for name in BAD_MODELS if name != "unknown type"])
def test_a_check_without_heavy_imports_finds_the_same(
    name: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, said = BAD_MODELS[name]
    damage(world / "model")
    code = main(["check", "sft", *SFT, *ONE_STEP])
    lines = capsys.readouterr().err
    assert code == 3, lines
    assert said in lines
