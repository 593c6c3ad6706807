"""Everything on one GPU: bfloat16, weights by CUDA IPC, engines that sleep while models learn."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf.config.rollout import RolloutSection
from rlhf.engines.rollout import open_engine
from tests.integration.command_line import CommandLine, write_workplace

pytestmark = pytest.mark.timeout(1200)

SHARED = ("--colocate", "all", "--rollout.engine", "vllm", "--rollout.gpu-memory-utilization", "0.3")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    folder = tmp_path_factory.mktemp("gpu")
    write_workplace(folder)
    command = CommandLine(folder)
    yield command
    command.close()


def test_ppo_with_all_roles_on_one_gpu(command: CommandLine) -> None:
    run = command.run("ppo", "ppo.yaml", *SHARED, name="shared")
    assert run.code == 0, run.output
    assert [row["step"] for row in run.metrics] == [1, 2, 3, 4, 5, 6]
    for row in run.metrics:
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float)), row
        assert row["sampler/log_prob_gap"] < 0.1
    assert run.metrics[-1]["memory/rollout"] > 0


def test_a_sleeping_engine_gives_its_memory_back(tmp_path: Path) -> None:
    write_workplace(tmp_path)
    section = RolloutSection(engine="vllm", gpu_memory_utilization=0.3, max_prompt_tokens=16, max_response_tokens=8)
    engine = open_engine(
        section, str(tmp_path / "policy"), dtype="bfloat16", device="cuda", seed=0, name="engine", sync_backend="ipc"
    )
    total = torch.cuda.mem_get_info()[1]
    awake = torch.cuda.mem_get_info()[0]
    engine.sleep()
    asleep = torch.cuda.mem_get_info()[0]
    engine.wake()
    again = torch.cuda.mem_get_info()[0]
    engine.close()
    assert asleep - awake > 0.2 * total
    assert abs(again - awake) < 0.05 * total
