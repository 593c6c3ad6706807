"""Adapters: what is given without them, and which engine can add them."""

import pytest

from tests.unit.config.conftest import Problems

RIGHT = ("--data.path", "x.jsonl", "--policy.model", "m", "--reward.function", "rewards:score")
LORA = ("--policy.lora.rank", "8")
ALONE = ("--rollout.sync-adapters", "true")


@pytest.mark.parametrize(
    ("argv", "starts"),
    [
        (("--policy.lora.alpha", "16"), "--policy.lora.alpha: not used: policy.lora.rank 0 trains the model"),
        (("--policy.lora.targets", "q_proj"), "--policy.lora.targets: not used: policy.lora.rank 0 trains the model"),
        (ALONE, "--rollout.sync-adapters: the policy has no adapters"),
        ((*ALONE, "--policy.lora.rank", "513"), "--rollout.sync-adapters: vLLM adds adapters up to rank 512 (got 513)"),
        (
            (*ALONE, *LORA, "--rollout.engine", "transformers"),
            "--rollout.sync-adapters: the transformers engine takes merged weights only",
        ),
    ],
)
def test_refused(argv: tuple[str, ...], starts: str, problems: Problems) -> None:
    (problem,) = problems(*RIGHT, *argv, command="grpo")
    assert problem.startswith(starts)


@pytest.mark.parametrize("argv", [LORA, (*LORA, *ALONE), (*LORA, "--policy.lora.targets", "q_proj,v_proj")])
def test_allowed(argv: tuple[str, ...], problems: Problems) -> None:
    assert problems(*RIGHT, *argv, command="grpo") == []
