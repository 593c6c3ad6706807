"""Online runs whose models share sequences, on real Ray, DeepSpeed and vLLM: they compute what runs without groups
compute, and a run that goes on from a checkpoint is the run that never stopped. What the processes compute in every
ZeRO stage is in test_sequence_parallel.py."""

import os
from collections.abc import Sequence

import pytest

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
        os.environ.get("RLHF_TEST_SEQUENCE_PARALLEL") != "all",
        reason="two minutes of runs: RLHF_TEST_SEQUENCE_PARALLEL=all, every night",
    ),
]

MODELS = ("--policy.model", "policy", "--reward.model", "scorer")
GRPO = ("grpo", *MODELS, *SAMPLED, *GRPO_BY_VLLM, "--colocate", "policy,reference,reward")
OF_PPO = (
    *("ppo", *MODELS, *SAMPLED, *PPO, "--policy.mlp-chunk-tokens", "16", "--policy.gradient-checkpointing", "offload"),
    *("--colocate", "policy,reference,critic,reward"),
)


def shared(roles: Sequence[str], size: int) -> list[str]:
    """Flags that give each role one group of `size` processes."""
    flags = [("num-gpus-per-node", size), ("sequence-parallel-size", size)]
    return [word for role in roles for key, value in flags for word in (f"--{role}.{key}", str(value))]


@pytest.fixture(scope="module")
def grpo(command: CommandLine, head: RayHead) -> Run:
    """Policy, reference and reward model of two processes each, which share every sequence."""
    return started(command, head, [*GRPO, *shared(("policy", "reference", "reward"), 2)], "shared-grpo")


def test_grpo_with_vllm_computes_what_it_computes_alone(command: CommandLine, head: RayHead, grpo: Run) -> None:
    alone = started(command, head, GRPO, "alone-grpo")
    assert_close(grpo, alone, ["reward/mean", "policy/loss", "policy/grad_norm", "kl/ref_per_token"])
    assert_engine_agrees(grpo)


def test_grpo_with_vllm_goes_on_as_if_it_had_not_stopped(command: CommandLine, head: RayHead, grpo: Run) -> None:
    arguments = [*GRPO, *shared(("policy", "reference", "reward"), 2), "--resume"]
    assert_goes_on(grpo, lambda: started(command, head, arguments, "shared-grpo"))


def test_ppo_shares_the_sequences_of_all_its_models(command: CommandLine, head: RayHead) -> None:
    """With a critic, feed-forward layers in chunks and activations in host memory."""
    alone = started(command, head, OF_PPO, "alone-ppo")
    run = started(command, head, [*OF_PPO, *shared(("policy", "reference", "critic", "reward"), 2)], "shared-ppo")
    assert_close(run, alone, ["reward/mean", "policy/grad_norm", "critic/loss", "critic/grad_norm"])
