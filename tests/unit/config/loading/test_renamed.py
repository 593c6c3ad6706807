"""Settings under their old names: read for one more version, with a warning."""

import warnings
from pathlib import Path

import pytest

from rlhf.cli.main import main
from rlhf.config.algo import DapoSection, OnlineDpoSection, PpoSection
from rlhf.config.commands import GrpoConfig, OnlineDpoConfig, PpoConfig
from rlhf.config.loading.load import load_config
from rlhf.config.loading.load_tools import load_data_report, load_sample
from rlhf.config.renamed import RENAMED_KEYS, RenamedSettingWarning
from rlhf.config.rollout import RolloutSection
from rlhf.errors import ConfigError

BASE = ("--policy.model", "m", "--data.path", "d.jsonl", "--reward.function", "r:f")


def grpo(*argv: str, environ: dict[str, str] | None = None) -> GrpoConfig:
    config = load_config("grpo", [*argv, *BASE], environ or {})
    assert isinstance(config, GrpoConfig)
    return config


def test_an_old_flag_is_read_with_a_warning_that_names_the_new_one() -> None:
    with pytest.warns(RenamedSettingWarning, match="--rollout.num-samples: renamed; use --rollout.group-size"):
        assert grpo("--rollout.num-samples", "4").rollout.group_size == 4


@pytest.mark.parametrize(("flag", "value"), [("--algo", True), ("--no-algo", False)])
def test_a_switch_keeps_both_of_its_forms(flag: str, value: bool) -> None:
    with pytest.warns(RenamedSettingWarning, match="--algo.dynamic-sampling"):
        config = grpo("--algo", "dapo", f"{flag}.drop-equal-groups")
    assert isinstance(config.algo, DapoSection)
    assert config.algo.dynamic_sampling is value


def test_an_old_key_in_a_file_is_read_and_its_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rollout:\n  batch_size: 8\n  num_samples: 4\n")
    with pytest.warns(RenamedSettingWarning, match=r"run.yaml:3: rollout.num_samples: renamed; use rollout.group_size"):
        assert grpo(str(file), "--train.batch-size", "32").rollout.group_size == 4


def test_a_wrong_value_under_an_old_name_is_still_located(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rollout:\n  num_samples: none\n")
    with (
        pytest.warns(RenamedSettingWarning),
        pytest.raises(ConfigError, match=r"run.yaml:2: rollout.group_size: must be a whole number"),
    ):
        grpo(str(file))


def test_an_old_variable_of_the_environment_is_read() -> None:
    ppo = (*BASE, "--train.num-steps", "9")
    with pytest.warns(RenamedSettingWarning, match="RLHF__ALGO__CRITIC_WARMUP_STEPS"):
        config = load_config("ppo", ppo, {"RLHF__ALGO__FREEZE_POLICY_STEPS": "3"})
    assert isinstance(config, PpoConfig)
    assert isinstance(config.algo, PpoSection)
    assert config.algo.critic_warmup_steps == 3


def test_a_file_must_not_give_both_names(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rollout:\n  num_samples: 4\n  group_size: 8\n")
    with pytest.warns(RenamedSettingWarning), pytest.raises(ConfigError, match="given twice, under its old name too"):
        grpo(str(file))


def test_an_old_value_is_read() -> None:
    with pytest.warns(RenamedSettingWarning, match="--algo.reference: behaviour: renamed; use behavior"):
        config = load_config("online-dpo", [*BASE, "--algo.reference", "behaviour"], {})
    assert isinstance(config, OnlineDpoConfig)
    assert isinstance(config.algo, OnlineDpoSection)
    assert config.algo.reference == "behavior"


def test_an_old_kind_of_rows_is_read() -> None:
    with pytest.warns(RenamedSettingWarning, match="use labeled"):
        assert load_data_report(["labelled", "--data.path", "d.jsonl"], {}).kind == "labeled"


def test_old_names_are_read_in_python() -> None:
    with pytest.warns(RenamedSettingWarning, match="num_samples: renamed; use group_size"):
        assert RolloutSection.model_validate({"num_samples": 4}).group_size == 4
    with pytest.warns(RenamedSettingWarning, match="reference behaviour: renamed; use behavior"):
        assert OnlineDpoSection.model_validate({"reference": "behaviour"}).reference == "behavior"


def test_a_present_setting_of_the_same_name_is_none_of_them() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        argv = ["m", "--data.path", "d.jsonl", "--out", "s.jsonl", "--num-samples", "4"]
        assert load_sample(argv, {}).num_samples == 4


@pytest.mark.parametrize("old", RENAMED_KEYS)
def test_a_command_line_says_it_once(old: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "ppo", f"--{old}", "1"])
    warning = f"rlhf: warning: --{old.replace('_', '-')}: renamed; use --"
    known = old != "algo.drop_equal_groups"  # ppo has no groups to leave out
    assert capsys.readouterr().err.count(warning) == known
