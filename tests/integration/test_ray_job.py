"""A run submitted to a Ray cluster as a job, with the folder that it needs."""

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.integration.command_line import CommandLine
from tests.integration.ray_head import RAY, RayHead

SUBMIT_TIMEOUT_S = 600.0
AGENT_TIMEOUT_S = 120.0


def submit(head: RayHead, folder: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """`ray job submit`, from elsewhere. A cluster that has just started has no agent yet that takes jobs."""
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
            return job


@pytest.mark.timeout(900)
def test_a_submitted_job_succeeds_and_shows_its_progress(command: CommandLine, head: RayHead, tmp_path: Path) -> None:
    folder = tmp_path / "job"
    shutil.copytree(command.workplace, folder, ignore=shutil.ignore_patterns("runs", "*.log"))
    shorter = ("--train.num-steps", "2", "--rollout.engine", "transformers", "--colocate", "all")
    job = submit(head, folder, "rlhf", "train", "ppo", "ppo.yaml", *shorter, "--run.dir", str(tmp_path / "runs"))
    assert job.returncode == 0, job.stdout + job.stderr
    assert "step 1/2" in job.stdout
    assert "step 2/2" in job.stdout
    assert re.search(r"Job 'raysubmit_\w+' succeeded", job.stdout)
    AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "run" / "model")
