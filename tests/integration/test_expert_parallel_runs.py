"""Online runs whose policy and critic have the experts of each layer on two processes, on real Ray, DeepSpeed and vLLM:
they compute what runs compute that have all experts on each process, and a run that goes on from a checkpoint is the
run that never stopped. What the processes compute is in test_expert_parallel.py."""

import os
import shutil
from collections.abc import Sequence

import pytest

from tests.family_models import write_family
from tests.integration.command_line import CommandLine, Run
from tests.integration.ray_head import RayHead

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        os.environ.get("RLHF_TEST_EXPERT_PARALLEL") != "all",
        reason="two minutes of runs: RLHF_TEST_EXPERT_PARALLEL=all, every night",
    ),
]

COMMON = (
    *("--policy.model", "qwen3_moe", "--policy.lr", "1e-3", "--policy.warmup-ratio", "0", "--data.template", "plain"),
    *("--data.path", "prompts.jsonl", "--reward.function", "taste:vowels", "--rollout.max-prompt-tokens", "16"),
    *("--rollout.max-response-tokens", "8", "--rollout.batch-size", "4", "--algo.kl.coef", "0.05"),
    *("--policy.num-gpus-per-node", "2", "--policy.gradient-checkpointing", "--train.num-steps", "4"),
    *("--checkpoint.every-steps", "2", "--no-log.tensorboard"),
)
GRPO = (
    *("grpo", *COMMON, "--rollout.engine", "vllm", "--rollout.enforce-eager", "--rollout.kv-cache-gib", "0.1"),
    *("--rollout.group-size", "4", "--train.batch-size", "16", "--colocate", "policy,reference"),
    *("--reference.num-gpus-per-node", "2", "--algo.router-aux-coef", "0.01"),
)
PPO = (
    *("ppo", *COMMON, "--rollout.engine", "transformers", "--train.batch-size", "4", "--critic.lr", "1e-3"),
    *("--critic.num-gpus-per-node", "2", "--critic.offload-optimizer", "--colocate", "policy,critic"),
)
SPLIT = ("--policy.expert-parallel-size", "2")


def started(command: CommandLine, head: RayHead, arguments: Sequence[str], name: str) -> Run:
    write_family(command.workplace / "qwen3_moe", "qwen3_moe")
    return command.run(*arguments, "--cluster.address", head.address, name=name, environment=head.environment)


def assert_close(run: Run, alone: Run, figures: Sequence[str]) -> None:
    """The first step's figures are the same but for rounding: later ones follow from samples of other weights."""
    ours, theirs = run.metrics[0], alone.metrics[0]
    for name in figures:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


@pytest.fixture(scope="module")
def grpo(command: CommandLine, head: RayHead) -> Run:
    return started(command, head, [*GRPO, *SPLIT], "split-grpo")


def test_grpo_with_vllm_computes_what_it_computes_alone(command: CommandLine, head: RayHead, grpo: Run) -> None:
    alone = started(command, head, GRPO, "whole-grpo")
    assert_close(grpo, alone, ["reward/mean", "policy/loss", "policy/grad_norm", "router/balance_loss"])
    for row in grpo.metrics:
        assert row["mismatch/log_prob_max"] <= 1e-4
        assert row["updates/applied"] == 1.0


def test_grpo_with_vllm_goes_on_as_if_it_had_not_stopped(command: CommandLine, head: RayHead, grpo: Run) -> None:
    weights, figures = grpo.weights, grpo.figures
    shutil.rmtree(grpo.folder / "checkpoints" / "step_4")
    shutil.rmtree(grpo.model)
    resumed = started(command, head, [*GRPO, *SPLIT, "--resume"], "split-grpo")
    assert resumed.weights == weights
    assert resumed.figures == figures


def test_ppo_has_the_experts_of_both_models_on_two_processes(command: CommandLine, head: RayHead) -> None:
    alone = started(command, head, PPO, "whole-ppo")
    run = started(command, head, [*PPO, *SPLIT, "--critic.expert-parallel-size", "2"], "split-ppo")
    assert_close(run, alone, ["reward/mean", "policy/grad_norm", "critic/loss", "critic/grad_norm"])
