"""Every example runs as its own docstring says, on small models, and the whole loop and the notebook learn.

These two start a cluster of their own, the whole loop with vLLM. The others join one, and sample with the engine that
starts fastest: which engine it is stands in none of them.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.integration.ray_head import RayHead
from tests.tiny_models import make_policy

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(folder: Path, arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """Run a command in `folder`, with this checkout on the path. Returns what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLES)])},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def joined(head: RayHead) -> dict[str, str]:
    """An environment in which runs join the tests' cluster."""
    return {**head.environment, "RLHF__CLUSTER__ADDRESS": head.address}


def sampling(head: RayHead) -> dict[str, str]:
    return {**joined(head), "RLHF__ROLLOUT__ENGINE": "transformers"}


def rewards_of(folder: Path, name: str) -> list[float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["reward/mean"] for line in lines]


def test_the_whole_loop_learns(tmp_path: Path) -> None:
    environment = {**os.environ, "RLHF__ROLLOUT__ENFORCE_EAGER": "true"}
    printed = run(tmp_path, [str(EXAMPLES / "the_whole_loop.py"), "--num-steps", "16"], environment)
    rewards = [float(reward) for reward in re.findall(r"^step \d+: reward (\S+)$", printed, re.MULTILINE)]
    assert len(rewards) == 16
    assert sum(rewards[-3:]) / 3 > 1.5 * sum(rewards[:3]) / 3, rewards


def test_the_whole_loop_is_a_page_to_read() -> None:
    assert len((EXAMPLES / "the_whole_loop.py").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_notebook_learns(tmp_path: Path) -> None:
    """In a real kernel, whose main thread runs an event loop."""
    script = (
        "import sys, nbformat; from nbclient import NotebookClient; book = nbformat.read(sys.argv[1], 4);"
        "NotebookClient(book, timeout=800, kernel_name='python3').execute()"
    )
    run(tmp_path, ["-c", script, str(EXAMPLES / "quickstart.ipynb")])
    rewards = rewards_of(tmp_path, "notebook")
    assert sum(rewards[-3:]) / 3 > 1.5 * sum(rewards[:3]) / 3, rewards


def test_a_custom_reward(tmp_path: Path, head: RayHead) -> None:
    make_policy(tmp_path / "policy")
    printed = run(
        tmp_path, [str(EXAMPLES / "custom_reward.py"), "--model", "policy", "--num-steps", "2"], sampling(head)
    )
    assert "->" in printed.splitlines()[-1]
    assert len(rewards_of(tmp_path, "custom_reward")) == 2


def test_grpo_on_rows_like_gsm8k(tmp_path: Path, head: RayHead) -> None:
    make_policy(tmp_path / "policy")
    rows = [{"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--num-steps", "1", "--group-size", "2", "--max-response-tokens", "8"]
    run(
        tmp_path,
        [str(EXAMPLES / "grpo_gsm8k.py"), "--model", "policy", "--data", "rows.jsonl", *arguments],
        sampling(head),
    )
    assert len(rewards_of(tmp_path, "grpo_gsm8k")) == 1


def test_dpo_on_dialogues(tmp_path: Path, head: RayHead) -> None:
    make_policy(tmp_path / "policy")
    rows = [
        {"chosen": f"\n\nHuman: say {n}\n\nAssistant: aaa", "rejected": f"\n\nHuman: say {n}\n\nAssistant: zz"}
        for n in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--num-steps", "2", "--batch-size", "4", "--max-tokens", "64"]
    printed = run(
        tmp_path, [str(EXAMPLES / "dpo_hh.py"), "--model", "policy", "--data", "pairs.jsonl", *arguments], joined(head)
    )
    assert "held-out accuracy" in printed


def test_a_custom_algorithm_with_a_critic(tmp_path: Path, head: RayHead) -> None:
    make_policy(tmp_path / "policy")
    printed = run(
        tmp_path, [str(EXAMPLES / "custom_algorithm.py"), "--model", "policy", "--num-steps", "2"], sampling(head)
    )
    assert "after 2 steps" in printed.splitlines()[-1]
    assert len(rewards_of(tmp_path, "custom_algorithm")) == 2
