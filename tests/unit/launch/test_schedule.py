"""A run of some epochs has the steps that read every row of each."""

import pytest

from rlhf.config.loading.load import load_config
from rlhf.launch.schedule import run_length, unlearned

COMMON = ["--policy.model", "m", "--data.path", "x.jsonl"]
SAMPLED = ["--rollout.batch-size", "4", "--rollout.group-size", "2", "--train.batch-size", "8"]
ONLINE = [*SAMPLED, "--reward.rules", "length"]


@pytest.mark.parametrize(
    ("method", "arguments", "num_rows", "num_steps"),
    [
        ("sft", ["--train.batch-size", "64"], 65, 2),
        ("sft", ["--train.batch-size", "64", "--train.num-epochs", "3"], 65, 6),
        ("dpo", ["--train.batch-size", "4", "--train.num-epochs", "2"], 8, 4),
        ("grpo", [*ONLINE, "--train.num-epochs", "2"], 7, 4),
        ("grpo", [*ONLINE, "--train.num-steps", "3"], 7, 3),
    ],
)
def test_steps_follow_from_epochs(method: str, arguments: list[str], num_rows: int, num_steps: int) -> None:
    """An offline batch ends with its epoch; sampled prompts go on into the next."""
    config = load_config(method, [*COMMON, *arguments], {})
    assert run_length(config, num_rows).num_steps == num_steps


@pytest.mark.parametrize(
    ("warmup", "epochs", "learns"), [("2", "1", False), ("3", "1", False), ("1", "1", True), ("2", "2", True)]
)
def test_a_policy_that_would_never_learn_is_refused_when_steps_follow_from_epochs(
    warmup: str, epochs: str, learns: bool
) -> None:
    arguments = [*ONLINE, "--algo.critic-warmup-steps", warmup, "--train.num-epochs", epochs]
    config = load_config("ppo", [*COMMON, *arguments], {})
    text = unlearned(config, 7)
    assert (text is None) is learns
    if text is not None:
        assert text.startswith(f"algo.critic_warmup_steps: {warmup} of 2 steps (1 epoch over 7 rows): the policy would")
