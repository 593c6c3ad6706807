"""Online runs whose models share sequences, on real Ray, DeepSpeed and vLLM: they compute what runs without groups
compute, and a run that goes on from a checkpoint is the run that never stopped. What the processes compute in every
ZeRO stage is in test_sequence_parallel.py."""

import os
import shutil
from collections.abc import Sequence

import pytest

from tests.integration.command_line import CommandLine, Run
from tests.integration.ray_head import RayHead

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        os.environ.get("RLHF_TEST_SEQUENCE_PARALLEL") != "all",
        reason="two minutes of runs: RLHF_TEST_SEQUENCE_PARALLEL=all, every night",
    ),
]

COMMON = (
    *("--policy.model", "policy", "--policy.lr", "1e-3", "--policy.warmup-ratio", "0", "--data.path", "prompts.jsonl"),
    *("--data.template", "plain", "--reward.model", "scorer", "--rollout.max-prompt-tokens", "16"),
    *("--rollout.max-response-tokens", "8", "--rollout.batch-size", "4", "--train.num-steps", "4"),
    *("--algo.kl.coef", "0.05", "--checkpoint.every-steps", "2", "--no-log.tensorboard"),
)
GRPO = (
    *("grpo", *COMMON, "--rollout.engine", "vllm", "--rollout.enforce-eager", "--rollout.kv-cache-gib", "0.1"),
    *("--rollout.group-size", "4", "--train.batch-size", "16", "--colocate", "policy,reference,reward"),
)
PPO = (
    *("ppo", *COMMON, "--rollout.engine", "transformers", "--train.batch-size", "4", "--critic.lr", "1e-3"),
    *("--policy.mlp-chunk-tokens", "16", "--policy.gradient-checkpointing", "offload"),
    *("--colocate", "policy,reference,critic,reward"),
)


def shared(roles: Sequence[str], size: int) -> list[str]:
    """Flags that give each role one group of `size` processes."""
    flags = [("num-gpus-per-node", size), ("sequence-parallel-size", size)]
    return [word for role in roles for key, value in flags for word in (f"--{role}.{key}", str(value))]


def started(command: CommandLine, head: RayHead, arguments: Sequence[str], name: str) -> Run:
    return command.run(*arguments, "--cluster.address", head.address, name=name, environment=head.environment)


def assert_close(run: Run, alone: Run, figures: Sequence[str]) -> None:
    """The first step's figures are the same but for rounding: later ones follow from samples of other weights."""
    ours, theirs = run.metrics[0], alone.metrics[0]
    for name in figures:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


@pytest.fixture(scope="module")
def grpo(command: CommandLine, head: RayHead) -> Run:
    """Policy, reference and reward model of two processes each, which share every sequence."""
    return started(command, head, [*GRPO, *shared(("policy", "reference", "reward"), 2)], "shared-grpo")


def test_grpo_with_vllm_computes_what_it_computes_alone(command: CommandLine, head: RayHead, grpo: Run) -> None:
    alone = started(command, head, GRPO, "alone-grpo")
    assert_close(grpo, alone, ["reward/mean", "policy/loss", "policy/grad_norm", "kl/ref_per_token"])
    for row in grpo.metrics:
        assert row["mismatch/log_prob_max"] <= 1e-4
        assert row["updates/applied"] == 1.0


def test_grpo_with_vllm_goes_on_as_if_it_had_not_stopped(command: CommandLine, head: RayHead, grpo: Run) -> None:
    weights, figures = grpo.weights, grpo.figures
    shutil.rmtree(grpo.folder / "checkpoints" / "step_4")
    shutil.rmtree(grpo.model)
    arguments = [*GRPO, *shared(("policy", "reference", "reward"), 2), "--resume"]
    resumed = started(command, head, arguments, "shared-grpo")
    assert resumed.weights == weights
    assert resumed.figures == figures


def test_ppo_shares_the_sequences_of_all_its_models(command: CommandLine, head: RayHead) -> None:
    """With a critic, feed-forward layers in chunks and activations in host memory."""
    alone = started(command, head, PPO, "alone-ppo")
    run = started(command, head, [*PPO, *shared(("policy", "reference", "critic", "reward"), 2)], "shared-ppo")
    assert_close(run, alone, ["reward/mean", "policy/grad_norm", "critic/loss", "critic/grad_norm"])
