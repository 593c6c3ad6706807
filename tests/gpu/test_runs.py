"""Whole runs whose engines, ranks and transfers meet only on GPUs. Each is short, and says what it must not break."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.integration.command_line import CommandLine, Run, clean_environment, write_workplace

pytestmark = pytest.mark.timeout(1200)

GRPO = (
    *("grpo", "--policy.model", "policy", "--policy.lr", "1e-3", "--reward.function", "taste:vowels"),
    *("--data.path", "prompts.jsonl", "--data.template", "plain", "--data.eval-fraction", "0.15"),
    *("--train.num-steps", "3", "--train.batch-size", "8", "--log.tensorboard", "false"),
    *("--rollout.batch-size", "4", "--rollout.group-size", "2", "--rollout.max-prompt-tokens", "16"),
    *("--rollout.max-response-tokens", "8", "--rollout.engine", "vllm", "--rollout.gpu-memory-utilization", "0.3"),
)
SHARED = ("--colocate", "all")
LORA = ("--policy.lora.rank", "4")


def gpus(number: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(torch.cuda.device_count() < number, reason=f"needs {number} GPUs")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    folder: Path = tmp_path_factory.mktemp("runs")
    write_workplace(folder)
    command = CommandLine(folder)
    yield command
    command.close()


def require_three_steps(run: Run) -> None:
    """All steps were made, with engines that compute what the trainer does: where both had the same weights."""
    assert [row["step"] for row in run.metrics] == [1, 2, 3], run.output
    assert max(row["mismatch/log_prob"] for row in run.metrics if not row["rollout/lag_mean"]) < 0.1
    assert all(row["updates/applied"] for row in run.metrics)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("evaluation", ("--eval.every-steps", "1")),
        ("checkpoints", ("--checkpoint.every-steps", "1", "--algo.dynamic-sampling", "true")),
        ("merged-adapters", LORA),
        ("adapters-alone", (*LORA, "--rollout.sync-adapters", "true")),
        ("four-bits", (*LORA, "--policy.quantization", "nf4")),
        ("swapped-optimizer", ("--policy.swap-optimizer",)),
    ],
)
def test_a_run_whose_engine_sleeps(name: str, flags: tuple[str, ...], command: CommandLine) -> None:
    """It wakes for evaluations without a sync, beside a checkpoint that is saved, and for adapters."""
    require_three_steps(command.run(*GRPO, *SHARED, *flags, name=name, environment=clean_environment()))


def test_a_run_that_continues(command: CommandLine) -> None:
    """Engines get the weights of the checkpoint before they sample."""
    command.run(*GRPO, *SHARED, "--train.num-steps", "2", name="continued", environment=clean_environment())
    require_three_steps(command.run(*GRPO, *SHARED, "--resume", name="continued", environment=clean_environment()))


@pytest.mark.parametrize(
    ("policy", "width", "flags"),
    [
        pytest.param(1, 1, (), marks=gpus(2), id="one-to-one"),
        pytest.param(1, 2, (), marks=gpus(3), id="to-two-of-an-engine"),
        pytest.param(2, 1, (), marks=gpus(3), id="from-two-shards"),
        pytest.param(1, 1, ("--rollout.max-lag", "1"), marks=gpus(2), id="asynchronous"),
        pytest.param(1, 1, ("--rollout.max-lag", "1", "--rollout.kv-cache", "keep"), marks=gpus(2), id="kept-cache"),
    ],
)
def test_a_run_whose_engine_has_gpus_of_its_own(
    policy: int, width: int, flags: tuple[str, ...], command: CommandLine
) -> None:
    """Its weights come by NCCL."""
    sizes = ("--policy.num-gpus-per-node", str(policy), "--rollout.tensor-parallel-size", str(width))
    name = f"apart-{policy}-{width}-{len(flags)}"
    run = command.run(*GRPO, *sizes, *flags, name=name, environment=clean_environment())
    require_three_steps(run)
    assert "sync/seconds" in run.metrics[-1]
