"""Sampling from a mixture of policy and reference: which engine can, and which reference."""

import pytest

from rlhf.config.loading.load import load_config
from tests.unit.config.conftest import Problems

RIGHT = ("--data.path", "x.jsonl", "--policy.model", "m", "--reward.function", "rewards:score")
MIXED = ("--algo.mixture", "0.5", "--algo.loss.type", "ipo")


@pytest.mark.parametrize(
    ("argv", "starts"),
    [
        (("--algo", "nash-md", "--rollout.engine", "vllm"), "--rollout.engine: vllm samples from one model"),
        ((*MIXED, "--rollout.engine", "vllm"), "--rollout.engine: vllm samples from one model"),
        ((*MIXED, "--algo.reference", "ema"), "--algo.mixture: 0.5 mixes the frozen reference"),
        ((*MIXED, "--algo.reference", "refresh"), "--algo.mixture: 0.5 mixes the frozen reference"),
    ],
)
def test_refused(argv: tuple[str, ...], starts: str, problems: Problems) -> None:
    (problem,) = problems(*RIGHT, *argv, command="online-dpo")
    assert problem.startswith(starts)


@pytest.mark.parametrize(
    ("argv", "engine"),
    [
        (("--algo", "nash-md"), "transformers"),
        (MIXED, "transformers"),
        ((*MIXED, "--rollout.engine", "transformers"), "transformers"),
        ((), "auto"),
        (("--rollout.engine", "vllm"), "vllm"),
        (("--algo", "nash-md", "--algo.mixture", "0"), "auto"),
    ],
)
def test_what_mixes_is_sampled_by_the_engine_that_can(argv: tuple[str, ...], engine: str) -> None:
    config = load_config("online-dpo", [*RIGHT, *argv], {})
    assert config.model_dump()["rollout"]["engine"] == engine
