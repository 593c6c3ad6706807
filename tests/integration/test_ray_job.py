"""Runs submitted to a Ray cluster of several nodes as jobs, with the folder that they need, from a folder that is not
theirs; and what they do when a node goes down."""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from rlhf.orchestrator.run.files import read_rows
from rlhf.orchestrator.run.run_directory import newest_processes
from tests.integration.command_line import CommandLine
from tests.integration.ray_head import RAY, RayHead, joined_nodes, lose_node, start_ray_head

SUBMIT_TIMEOUT_S = 600.0
AGENT_TIMEOUT_S = 120.0
SHORT = ("--train.num-steps", "2", "--rollout.engine", "transformers")


@pytest.fixture(scope="module")
def narrow_head() -> Iterator[RayHead]:
    """A cluster whose first node has one core."""
    head = start_ray_head(num_cpus=1, has_job_server=True)
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


@pytest.mark.timeout(600)
def test_a_process_without_the_clusters_token_is_told_so(narrow_head: RayHead) -> None:
    """Not that there is no cluster."""
    own = {key: value for key, value in narrow_head.environment.items() if not key.startswith("RAY_AUTH")}
    join = f"from rlhf.actors.connection import join; join({narrow_head.address!r}, 'test')"
    for environment, why in (
        (own, "RAY_AUTH_MODE=token is not set here"),
        ({**own, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, "it rejects the one that is here"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", join], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert f"ConfigError: ray: the cluster at {narrow_head.address} needs a token, and {why}." in done.stderr


@pytest.mark.timeout(900)
def test_a_job_runs_over_two_nodes(narrow_head: RayHead, folder: Path, tmp_path: Path) -> None:
    with joined_nodes(narrow_head, ["127.0.0.2"], num_cpus=1):
        output = submit(narrow_head, folder, "rlhf", "train", "ppo", "ppo.yaml", *SHORT, "--run.dir", str(tmp_path))
    assert "step 1/2" in output
    assert "step 2/2" in output
    assert len(set(nodes_of(output).values())) == 2, output
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def wait_for_step(run: Path, job: "Future[str]") -> None:
    """Wait until a run has done its first step."""
    deadline = time.monotonic() + SUBMIT_TIMEOUT_S
    while not read_rows(run / "metrics.jsonl"):
        assert not job.done(), job.result()
        assert time.monotonic() < deadline, "no step was done"
        time.sleep(0.1)


@pytest.mark.timeout(900)
def test_a_job_outlives_one_of_its_nodes(narrow_head: RayHead, folder: Path, tmp_path: Path) -> None:
    """Three roles on three nodes. That of the reference or of the engine goes down, and another one is idle."""
    own = ("--run.dir", str(tmp_path), "--algo.kl.coef", "0.01", "--data.path", "prompts.jsonl")
    flags = ("--policy.model", "policy", "--reward.function", "taste:vowels", "--rollout.batch-size", "2")
    sizes = ("--train.batch-size", "8", "--rollout.max-prompt-tokens", "16", "--rollout.max-response-tokens", "8")
    steps = ("--train.num-steps", "20", "--rollout.engine", "transformers")
    run = tmp_path / "run"
    others = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    with joined_nodes(narrow_head, others, num_cpus=1) as nodes, ThreadPoolExecutor(1) as pool:
        job = pool.submit(submit, narrow_head, folder, "rlhf", "train", "grpo", *flags, *sizes, *steps, *own)
        wait_for_step(run, job)
        sat = {process.name: process.host for process in newest_processes(run)}
        lost = next(name for name in ("reference rank 0", "rollout engine 0") if sat[name] in nodes)
        lose_node(nodes[sat[lost]])
        output = job.result()
    assert "step 20/20" in output
    first = nodes_of(output)
    assert len({first["policy rank 0"], first["reference rank 0"], first["rollout engine 0"]}) == 3, output
    # Nobody but those that sat on the node, and none twice. A restart, where it was an engine in the midst of a sync.
    told = [str(row["text"]) for row in read_rows(run / "events.jsonl") if row["kind"] in ("replacement", "restart")]
    there = [f"{name} (node {node}, pid " for name, node in sat.items() if node == sat[lost]]
    assert any(f"{lost} (node {sat[lost]}, pid " in text for text in told), told
    assert all(any(one in text for one in there) for text in told), told
    assert all(sum(one in text for text in told) <= 1 for one in there), told
    AutoModelForCausalLM.from_pretrained(run / "model")
