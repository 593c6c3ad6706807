"""Runs whose processes share the work of a model, beside runs in which each does all of it."""

import shutil
from collections.abc import Callable, Sequence

import pytest

from tests.integration.command_line import CommandLine, Run
from tests.integration.ray_head import RayHead

SAMPLED = (
    *("--policy.lr", "1e-3", "--policy.warmup-ratio", "0", "--data.path", "prompts.jsonl", "--data.template", "plain"),
    *("--rollout.max-prompt-tokens", "16", "--rollout.max-response-tokens", "8", "--rollout.batch-size", "4"),
    *("--algo.kl.coef", "0.05", "--train.num-steps", "4", "--checkpoint.every-steps", "2", "--no-log.tensorboard"),
)
GRPO_BY_VLLM = (
    *("--rollout.engine", "vllm", "--rollout.enforce-eager", "--rollout.kv-cache-gib", "0.1"),
    *("--rollout.group-size", "4", "--train.batch-size", "16"),
)
PPO = ("--rollout.engine", "transformers", "--train.batch-size", "4", "--critic.lr", "1e-3")


def started(command: CommandLine, head: RayHead, arguments: Sequence[str], name: str) -> Run:
    """A run in the tests' cluster, from its start to its end."""
    return command.run(*arguments, "--cluster.address", head.address, name=name, environment=head.environment)


def assert_close(run: Run, alone: Run, figures: Sequence[str]) -> None:
    """The first step's figures are the same but for rounding: later ones follow from samples of other weights."""
    ours, theirs = run.metrics[0], alone.metrics[0]
    for name in figures:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def assert_engine_agrees(run: Run) -> None:
    """In each step the engine's log-probs were the policy's, and the policy learned."""
    for row in run.metrics:
        assert row["mismatch/log_prob_max"] <= 1e-4
        assert row["updates/applied"] == 1.0


def assert_goes_on(run: Run, resume: Callable[[], Run]) -> None:
    """From the checkpoint of step 2, `resume` makes the same run again."""
    weights, figures = run.weights, run.figures
    shutil.rmtree(run.folder / "checkpoints" / "step_4")
    shutil.rmtree(run.model)
    resumed = resume()
    assert resumed.weights == weights
    assert resumed.figures == figures
