"""Runs submitted to a Ray cluster as jobs, with the folder that they need, from a folder that is not theirs."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.integration.command_line import CommandLine
from tests.integration.ray_head import RAY, RayHead, joined_nodes, start_ray_head

SUBMIT_TIMEOUT_S = 600.0
AGENT_TIMEOUT_S = 120.0
SHORT = ("--train.num-steps", "2", "--rollout.engine", "transformers")


@pytest.fixture(scope="module")
def narrow_head() -> Iterator[RayHead]:
    """A cluster whose first node has one core."""
    head = start_ray_head(num_cpus=1)
    yield head
    head.stop()


@pytest.fixture(scope="module")
def folder(command: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: models, rows, a config and a reward function."""
    folder = tmp_path_factory.mktemp("job") / "work"
    shutil.copytree(command.workplace, folder, ignore=shutil.ignore_patterns("runs", "*.log"))
    return folder


def submit(head: RayHead, folder: Path, *command: str) -> str:
    """`ray job submit`, from elsewhere; returns what the job printed. A cluster that has just started has no agent yet
    that takes jobs."""
    deadline = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        job = subprocess.run(
            [RAY, "job", "submit", "--address", head.dashboard, "--working-dir", str(folder), "--", *command],
            env=head.environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=SUBMIT_TIMEOUT_S,
            check=False,
        )
        if "No available agent" not in job.stderr or time.monotonic() > deadline:
            break
    assert job.returncode == 0, job.stdout + job.stderr
    assert re.search(r"Job 'raysubmit_\w+' succeeded", job.stdout)
    return job.stdout


def nodes_of(output: str) -> dict[str, str]:
    """Who sat on which node, as the run says when it has started."""
    return {name: node for name, node in re.findall(r"^  ([\w+ ]+?) \(node ([\d.]+), pid \d+\)", output, re.MULTILINE)}


@pytest.mark.timeout(900)
def test_a_job_runs_over_two_nodes(narrow_head: RayHead, folder: Path, tmp_path: Path) -> None:
    with joined_nodes(narrow_head, ["127.0.0.2"], num_cpus=1):
        output = submit(narrow_head, folder, "rlhf", "train", "ppo", "ppo.yaml", *SHORT, "--run.dir", str(tmp_path))
    assert "step 1/2" in output
    assert "step 2/2" in output
    assert len(set(nodes_of(output).values())) == 2, output
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.timeout(900)
def test_three_roles_on_three_nodes(narrow_head: RayHead, folder: Path, tmp_path: Path) -> None:
    own = ("--run.dir", str(tmp_path), "--algo.kl.coef", "0.01", "--data.path", "prompts.jsonl")
    flags = ("--policy.model", "policy", "--reward.function", "taste:vowels", "--rollout.batch-size", "2")
    sizes = ("--train.batch-size", "8", "--rollout.max-prompt-tokens", "16", "--rollout.max-response-tokens", "8")
    with joined_nodes(narrow_head, ["127.0.0.2", "127.0.0.3"], num_cpus=1):
        output = submit(narrow_head, folder, "rlhf", "train", "grpo", *flags, *sizes, *SHORT, *own)
    assert "step 2/2" in output
    nodes = nodes_of(output)
    assert len({nodes["policy rank 0"], nodes["reference rank 0"], nodes["rollout engine 0"]}) == 3, output
