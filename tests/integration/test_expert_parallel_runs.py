"""Online runs whose policy and critic have the experts of each layer on two processes, on real Ray, DeepSpeed and vLLM:
they compute what runs compute that have all experts on each process, and a run that goes on from a checkpoint is the
run that never stopped. What the processes compute is in test_expert_parallel.py."""

import os

import pytest

from tests.family_models import write_family
from tests.integration.command_line import CommandLine, Run
from tests.integration.equal_runs import (
    GRPO_BY_VLLM,
    PPO,
    SAMPLED,
    assert_close,
    assert_engine_agrees,
    assert_goes_on,
    started,
)
from tests.integration.ray_head import RayHead

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        os.environ.get("RLHF_TEST_EXPERT_PARALLEL") != "all",
        reason="two minutes of runs: RLHF_TEST_EXPERT_PARALLEL=all, every night",
    ),
]

COMMON = (
    *("--policy.model", "qwen3_moe", "--reward.function", "taste:vowels", *SAMPLED),
    *("--policy.num-gpus-per-node", "2", "--policy.gradient-checkpointing"),
)
GRPO = (
    *("grpo", *COMMON, *GRPO_BY_VLLM, "--colocate", "policy,reference", "--reference.num-gpus-per-node", "2"),
    *("--algo.router-aux-coef", "0.01"),
)
OF_PPO = (
    *("ppo", *COMMON, *PPO, "--critic.num-gpus-per-node", "2", "--critic.offload-optimizer"),
    *("--colocate", "policy,critic"),
)
SPLIT = ("--policy.expert-parallel-size", "2")


@pytest.fixture(scope="module")
def user(command: CommandLine) -> CommandLine:
    """The user's folder, with a mixture of experts in it."""
    write_family(command.workplace / "qwen3_moe", "qwen3_moe")
    return command


@pytest.fixture(scope="module")
def grpo(user: CommandLine, head: RayHead) -> Run:
    return started(user, head, [*GRPO, *SPLIT], "split-grpo")


def test_grpo_with_vllm_computes_what_it_computes_alone(user: CommandLine, head: RayHead, grpo: Run) -> None:
    alone = started(user, head, GRPO, "whole-grpo")
    assert_close(grpo, alone, ["reward/mean", "policy/loss", "policy/grad_norm", "router/balance_loss"])
    assert_engine_agrees(grpo)


def test_grpo_with_vllm_goes_on_as_if_it_had_not_stopped(user: CommandLine, head: RayHead, grpo: Run) -> None:
    assert_goes_on(grpo, lambda: started(user, head, [*GRPO, *SPLIT, "--resume"], "split-grpo"))


def test_ppo_has_the_experts_of_both_models_on_two_processes(user: CommandLine, head: RayHead) -> None:
    alone = started(user, head, OF_PPO, "whole-ppo")
    run = started(user, head, [*OF_PPO, *SPLIT, "--critic.expert-parallel-size", "2"], "split-ppo")
    assert_close(run, alone, ["reward/mean", "policy/grad_norm", "critic/loss", "critic/grad_norm"])
