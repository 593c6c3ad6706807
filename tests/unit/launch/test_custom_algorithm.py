"""An algorithm from outside the package that trains a critic: which methods can run it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import rlhf
from rlhf.algorithms import build_algorithm
from rlhf.config.algo import CustomSection, critic_warmup_steps, num_epochs
from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.config.loading.load import load_config
from rlhf.errors import ConfigError
from rlhf.launch.check import data_problems, surroundings
from rlhf.planning.roles import require_sections, sections
from rlhf.types import Role

EXAMPLES = Path(__file__).parents[3] / "examples"
ALGORITHM = ("--algo", "custom", "--algo.algorithm", "custom_algorithm:ActorCritic")
REFERENCED = """
import rlhf
from rlhf.algorithms.base import Needs
from rlhf.types import Head, Role, Signal

class Referenced(rlhf.Algorithm):
    def __init__(self, section):
        self.needs = Needs(trains={Role.POLICY: Head.LOG_PROBS}, signals=frozenset({Signal.REF_LOG_PROBS}))
    def credit(self, examples, signals): return [], None
    def objectives(self): return {}
"""


@pytest.fixture(autouse=True)
def in_examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(EXAMPLES)
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name in ("custom_algorithm", "referenced"):
        sys.modules.pop(name, None)


def config(command: str, *more: str) -> TrainConfig:
    words = [*ALGORITHM, "--policy.model", "m", "--data.path", "rows.jsonl", *more]
    return load_config(command, words, {})


def test_ppo_runs_it_from_its_own_file() -> None:
    custom = config("ppo", "--reward.function", "custom_algorithm:brief")
    assert isinstance(custom, OnlineConfig)
    assert isinstance(custom.algo, CustomSection)
    needs = build_algorithm(custom.algo).needs
    assert set(needs.trains) == {Role.POLICY, Role.CRITIC}
    started = sections(custom, needs)
    assert list(started) == [Role.POLICY, Role.CRITIC]
    assert started[Role.CRITIC].model == "m"
    assert [problem.text for problem in surroundings(custom, {}) if problem.keys[0].startswith("algo")] == []
    assert (num_epochs(custom.algo), critic_warmup_steps(custom.algo)) == (1, 0)
    assert all("ptx" not in text for text in data_problems(custom).lines)


def test_its_settings_are_one_value_in_files_and_from_python(tmp_path: Path) -> None:
    algo = {"type": "custom", "algorithm": "a:B", "settings": {"my-clip": 0.2, "nested": {"a": [1]}}}
    given = {"policy": {"model": "m"}, "data": {"path": "rows.jsonl"}, "algo": algo}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    from_file = load_config("dpo", [str(tmp_path / "config.yaml")], {})
    assert isinstance(from_file.algo, CustomSection)
    assert from_file.algo.settings == algo["settings"]
    assert rlhf.load_config("dpo", settings=given).algo == from_file.algo


@pytest.mark.parametrize(("command", "more"), [("grpo", ("--reward.function", "custom_algorithm:brief")), ("dpo", ())])
def test_a_method_without_a_critic_refuses_it(command: str, more: tuple[str, ...]) -> None:
    custom = config(command, *more)
    expected = f"it trains the critic, which `rlhf train {command}` cannot. Run it as `rlhf train ppo --algo custom`."
    (problem,) = [problem for problem in surroundings(custom, {}) if problem.keys == ("algo.algorithm",)]
    assert problem.text == expected
    with pytest.raises(ConfigError, match="Run it as `rlhf train ppo --algo custom`"):
        require_sections(custom, build_algorithm(custom.algo).needs)


def test_a_reference_must_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "referenced.py").write_text(REFERENCED)
    given = ["--algo", "custom", "--algo.algorithm", "referenced:Referenced", "--policy.model", "m"]
    custom = load_config("dpo", [*given, "--data.path", "rows.jsonl"], {})
    with pytest.raises(ConfigError, match=r"algo.reference: the algorithm needs ref_log_probs. Set it to true."):
        require_sections(custom, build_algorithm(custom.algo).needs)
    required = load_config("dpo", [*given, "--data.path", "rows.jsonl", "--algo.reference"], {})
    require_sections(required, build_algorithm(required.algo).needs)
