"""The Python API as far as nothing is started."""

import subprocess
import sys
from pathlib import Path

import pytest

import rlhf
from rlhf.errors import ConfigError

BASE: dict[str, object] = {"policy.model": "a", "data.path": "rows.jsonl", "reward.rules": ["number"]}


WITH_FUNCTION = {key: value for key, value in BASE.items() if key != "reward.rules"}


def score(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def test_every_public_name_is_there() -> None:
    assert {name for name in rlhf.__all__ if vars(rlhf).get(name) is None and rlhf.__getattr__(name) is None} == set()
    assert set(dir(rlhf)) >= {"train", "load_config", "check", "generate", "Reward", "Algorithm"}
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        rlhf.__getattr__("trian")


def test_the_package_and_its_configs_are_light() -> None:
    script = (
        "import sys, rlhf; assert len([m for m in sys.modules if m.startswith('rlhf')]) == 1, sys.modules\n"
        "rlhf.load_config('sft', settings={'policy.model': 'a', 'data.path': 'b'})\n"
        "heavy = {'torch', 'ray', 'transformers', 'vllm', 'datasets'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_settings_are_dotted_or_nested_and_override_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("policy: {lr: 1.0e-3}\ntrain: {num_steps: 3}\n")
    config = rlhf.load_config(
        "ppo",
        file,
        {
            **{k: v for k, v in BASE.items() if k != "policy.model"},
            "policy": {"model": Path("b")},
            "log.tensorboard": False,
        },
    )
    assert config.models["policy"].model == "b"
    assert (config.train.num_steps, config.log.tensorboard) == (3, False)
    assert config.models["policy"].model_dump()["lr"] == 1e-3


def test_a_function_stands_for_its_import_name() -> None:
    config = rlhf.load_config("grpo", settings={**WITH_FUNCTION, "reward.function": score})
    assert config.model_dump()["reward"]["function"] == "tests.unit.launch.test_api:score"


def test_what_no_worker_could_import_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^reward\.function: .* is not at the top of a module"):
        rlhf.load_config("grpo", settings={**WITH_FUNCTION, "reward.function": lambda prompts, responses: [0.0]})


def test_all_problems_come_at_once_with_their_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        rlhf.load_config("ppo", settings={**BASE, "policy.lr": -1.0, "policy.modle": "x", "train": {"num_steps": 0}})
    assert {problem.split(":")[0] for problem in caught.value.problems} == {
        "policy.modle",
        "policy.lr",
        "train.num_steps",
    }


def test_a_run_is_checked_before_it_starts(tmp_path: Path) -> None:
    config = rlhf.load_config("grpo", settings={**BASE, "policy.model": tmp_path / "none"})
    for call in (rlhf.check, rlhf.train):
        with pytest.raises(rlhf.RlhfError) as caught:
            call(config)
        assert "policy.model" in str(caught.value), call


def test_wrong_arguments_of_generate_are_named() -> None:
    with pytest.raises(ConfigError, match="temperature"):
        rlhf.generate("model", ["hello"], temperature=-1.0)
