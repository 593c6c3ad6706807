"""A policy in shards and an engine in parts, on the same two GPUs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.integration.command_line import CommandLine, clean_environment, write_workplace

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

TWO = (
    *("grpo", "--policy.model", "policy", "--policy.lr", "1e-3", "--reward.function", "taste:vowels"),
    *("--data.path", "prompts.jsonl", "--data.template", "plain", "--train.num-steps", "3", "--train.batch-size", "8"),
    *("--rollout.batch-size", "4", "--rollout.group-size", "2", "--rollout.max-prompt-tokens", "16"),
    *("--rollout.max-response-tokens", "8", "--rollout.engine", "vllm", "--rollout.gpu-memory-utilization", "0.3"),
    *("--colocate", "all", "--policy.num-gpus-per-node", "2", "--reference.num-gpus-per-node", "2"),
)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    folder: Path = tmp_path_factory.mktemp("gpus")
    write_workplace(folder)
    command = CommandLine(folder)
    yield command
    command.close()


@pytest.mark.parametrize("size", ["num-engines", "tensor-parallel-size", "pipeline-parallel-size"])
def test_grpo_with_all_roles_on_two_gpus(command: CommandLine, size: str) -> None:
    """Two ranks on one GPU would be refused by NCCL; weights by CUDA IPC need each engine, or each process
    of the only one, beside its own rank."""
    run = command.run(*TWO, f"--rollout.{size}", "2", name=f"gpus-{size}", environment=clean_environment())
    assert [row["step"] for row in run.metrics] == [1, 2, 3]
    assert max(row["mismatch/log_prob"] for row in run.metrics) < 0.1
