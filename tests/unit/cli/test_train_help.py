"""Help of `rlhf train METHOD`, by sections, by words, and with the defaults of the chosen algorithm."""

from pathlib import Path

import pytest

from rlhf.cli.main import main
from rlhf.cli.train_help import OFTEN_CHANGED, train_help
from rlhf.config.commands import COMMANDS, METHODS
from rlhf.config.fields import fields_by_name
from rlhf.errors import ConfigError

TWO_SCREENS = 60
WIDTH = 100


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_is_two_screens(name: str) -> None:
    lines = train_help("train", name, ["--help"]).splitlines()
    assert len(lines) <= TWO_SCREENS
    assert max(len(line) for line in lines[5:]) <= WIDTH + 20
    text = "\n".join(lines)
    assert all(f"\n  {section} " in text for section in METHODS[COMMANDS[name].method].config.model_fields)
    assert "--policy.model TEXT" in text or "--reward.model TEXT" in text


def test_settings_that_people_change_exist() -> None:
    keys = {key for method in METHODS.values() for key in fields_by_name(method.config)}
    assert set(OFTEN_CHANGED) <= keys


def test_a_section_has_all_its_settings() -> None:
    text = train_help("train", "grpo", ["--help", "rollout"])
    flags = [line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  --")]
    known = [name for name in fields_by_name(METHODS["grpo"].config) if name.startswith("rollout.")]
    assert flags == [f"--{name.replace('_', '-')}" for name in known]
    inner = train_help("train", "grpo", ["--help", "policy.lora"])
    assert [line.split()[0] for line in inner.splitlines() if line.startswith("  --")] == [
        "--policy.lora.rank",
        "--policy.lora.alpha",
        "--policy.lora.targets",
    ]


def test_a_word_is_searched_in_names_first() -> None:
    lines = train_help("train", "grpo", ["--help", "clip"]).splitlines()
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    assert {"--algo.clip-low", "--algo.clip-high", "--algo.dual-clip"} <= set(flags[:4])
    assert "--policy.max-grad-norm" in flags, "its help speaks of clipping"
    assert "--policy.lr" not in flags
    with pytest.raises(ConfigError, match=r'--help: no section and no setting is about "frobnicate"'):
        train_help("train", "grpo", ["--help", "frobnicate"])


@pytest.mark.parametrize(
    "words",
    [
        ["--algo", "dapo", "--help", "algo.clip_high"],
        ["--algo.type", "dapo", "--help", "algo.clip-high"],
        ["--algo=dapo", "--help", "algo.clip-high"],
        ["--help", "algo.clip_high", "--algo", "dapo"],
        ["run.yaml", "--help", "algo.clip_high"],
    ],
)
def test_defaults_are_those_of_the_chosen_algorithm(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("algo:\n  type: dapo\n")
    assert "[default 0.28; > 0]" in train_help("train", "grpo", words)
    assert "[default 0.2; > 0]" in train_help("train", "grpo", ["--help", "algo.clip_high"])


def test_the_overview_follows_too() -> None:
    assert "[0.28]" in train_help("train", "grpo", ["--algo", "dapo", "--help"])
    assert "[0.28]" in train_help("train", "dapo", ["--help"])
    assert "[0.28]" not in train_help("train", "grpo", ["--help"])


def test_the_command_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "grpo", "--help", "policy.lr"]) == 0
    assert capsys.readouterr().out.startswith("  --policy.lr NUMBER\n")
    assert main(["train", "grpo", "--help", "nothing-like-it"]) == 2
