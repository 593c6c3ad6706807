"""What 4 bits need is missed before anything starts."""

from importlib.util import find_spec

import pytest

from rlhf.config.loading.load import load_config
from rlhf.launch import check
from rlhf.launch.check import surroundings

MISSING = "bitsandbytes is not installed. Run `pip install bitsandbytes`."


@pytest.mark.parametrize(("quantization", "missed"), [("nf4", ["policy", "reference"]), ("none", [])])
def test_a_missing_package_is_told(quantization: str, missed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    argv = ("--data.path", "x.jsonl", "--policy.model", "m", "--reward.function", "rewards:score")
    config = load_config("grpo", [*argv, "--policy.lora.rank", "8", "--policy.quantization", quantization], {})
    problems = [problem for problem in surroundings(config, {}) if problem.text == MISSING]
    assert [problem.keys for problem in problems] == [(f"{role}.quantization",) for role in missed]
