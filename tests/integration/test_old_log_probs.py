"""Real runs that take old log-probs from the pass that learns, beside runs with a pass of their own: weights and
metrics are the same to the byte."""

import os

import pytest

from tests.integration.command_line import CommandLine
from tests.integration.equal_runs import started
from tests.integration.ray_head import RayHead

WHICH = os.environ.get("RLHF_TEST_OLD_LOG_PROBS")
RUNS: dict[str, tuple[str, ...]] = {
    "grpo": ("--algo.kl.coef", "0.05"),
    "online-dpo": (),
    "grpo by vllm": ("--rollout.engine", "vllm", "--rollout.enforce-eager", "--rollout.kv-cache-gib", "0.1"),
    "gspo": ("--algo.correction.type", "mask", "--algo.correction.level", "sequence"),
    "cispo": ("--policy.zero-stage", "3", "--policy.num-gpus-per-node", "2"),
    "dr-grpo": ("--algo.correction.type", "none"),
    "dapo": (),
    "rloo": ("--algo.kl-placement", "loss", "--algo.kl.coef", "0.05"),
    "reinforce++": ("--algo.kl.coef", "0"),
    "reinforce++-baseline": ("--algo.kl.coef", "0"),
    "remax": ("--algo.kl.coef", "0"),
    "ppo": ("--algo.kl.coef", "0", "--critic.lr", "1e-3"),
}
NIGHTLY = pytest.mark.skipif(WHICH != "all", reason="nightly: RLHF_TEST_OLD_LOG_PROBS=all")
COMMON = (
    *("--policy.model", "policy", "--reward.function", "taste:vowels", "--data.path", "prompts.jsonl"),
    *("--data.template", "plain", "--policy.lr", "1e-3", "--policy.warmup-ratio", "0", "--train.num-steps", "3"),
    *("--rollout.max-prompt-tokens", "16", "--rollout.max-response-tokens", "8", "--rollout.batch-size", "4"),
    *("--checkpoint.every-steps", "3", "--no-log.tensorboard", "--train.max-tokens-per-micro-batch", "64"),
)
"""Several micro-batches an optimizer step, and one optimizer step a rollout batch."""


@pytest.mark.parametrize("name", [name if name == "grpo" else pytest.param(name, marks=NIGHTLY) for name in RUNS])
def test_a_run_without_the_pass_is_the_same_run(name: str, command: CommandLine, head: RayHead) -> None:
    method = name.split(maxsplit=1)[0]
    engine = () if "--rollout.engine" in RUNS[name] else ("--rollout.engine", "transformers")
    group = () if method == "ppo" else ("--rollout.group-size", "4")
    size = ("--train.batch-size", "4" if method in ("ppo", "online-dpo") else "16")
    arguments = (method, *COMMON, *engine, *group, *size, *RUNS[name])
    run = name.replace(" ", "-").replace("+", "p")
    fused = started(command, head, arguments, run)
    separate = started(command, head, (*arguments, "--no-train.fuse-old-log-probs"), f"{run}-separate")
    assert fused.weights == separate.weights
    assert fused.figures == separate.figures
    for row in fused.metrics:
        assert row["mismatch/log_prob_max"] <= 1e-4
        assert row.get("policy/ratio_max", 1.0) == 1.0
