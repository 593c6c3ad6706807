"""Methods, and their members as commands."""

from pathlib import Path

import pytest

from rlhf.config.algo import DpoSection, NashMdSection, RlooSection
from rlhf.config.commands import COMMANDS, METHODS, DpoConfig, GrpoConfig, OnlineDpoConfig, TrainConfig
from rlhf.config.loading.load import load_config
from rlhf.config.loading.load_about_runs import load_chaos, load_plan
from rlhf.errors import ConfigError

BASE = ("--policy.model", "m", "--data.path", "d.jsonl")
ONLINE = (*BASE, "--reward.function", "r:f")


def load(name: str, *argv: str) -> TrainConfig:
    return load_config(name, [*argv, *(ONLINE if COMMANDS[name].method != "dpo" else BASE)], {})


def test_every_member_of_a_family_is_a_command() -> None:
    members = {name: command.method for name, command in COMMANDS.items() if name not in METHODS}
    assert members["rloo"] == members["reinforce++"] == members["dapo"] == "grpo"
    assert members["nash-md"] == "online-dpo"
    assert members["simpo"] == members["ipo"] == members["orpo"] == "dpo"
    assert "custom" not in members


def test_a_member_is_its_method_with_that_type() -> None:
    assert load("rloo") == load("grpo", "--algo", "rloo")
    assert load("simpo") == load("dpo", "--loss", "simpo")
    assert load("nash-md") == load("online-dpo", "--algo", "nash-md")
    rloo, simpo, nash = load("rloo"), load("simpo"), load("nash-md")
    assert isinstance(rloo, GrpoConfig)
    assert isinstance(rloo.algo, RlooSection)
    assert isinstance(simpo, DpoConfig)
    assert isinstance(simpo.algo, DpoSection)
    assert simpo.algo.loss.type == "simpo"
    assert isinstance(nash, OnlineDpoConfig)
    assert isinstance(nash.algo, NashMdSection)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in METHODS])
def test_every_member_can_be_planned_and_disturbed(name: str) -> None:
    argv = list(ONLINE if COMMANDS[name].method != "dpo" else BASE)
    assert load_plan(name, argv, {})[1] == load(name)
    assert type(load_chaos(name, argv, {})[1]) is COMMANDS[name].config


def test_a_file_may_state_the_members_type_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("algo:\n  type: rloo\n")
    assert load("rloo", str(file)) == load("rloo")
    with pytest.raises(ConfigError, match=r'run.yaml:2: algo.type: "rloo", but the command trains dapo. Remove it, or'):
        load("dapo", str(file))
    with pytest.raises(ConfigError, match=r'--algo\.type: "dapo", but the command trains rloo'):
        load("rloo", "--algo", "dapo")


def test_a_setting_of_another_member_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--algo\.loss\.gamma: only with type simpo"):
        load("ipo", "--algo.loss.gamma", "1")
