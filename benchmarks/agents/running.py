"""Runs of a case by the command line, and what its responses to held-out rows show."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.agents.cases import WAYS, Case
from benchmarks.agents.task import Measured, Task, read_rows
from rlhf.report.responses_file import recorded_steps

MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS = 32, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one case did."""

    before: Measured
    after: Measured
    lr: float
    steps: int
    responses: int
    """In a step."""
    minutes: float
    """Of the run alone, with its start and its evaluation."""


def make_task(task: Task, folder: Path, seed: int) -> None:
    """Write the model and the rows of a task, unless they are there."""
    if folder.exists():
        return
    temporary = folder.with_suffix(".part")
    task.make(temporary, seed)
    temporary.rename(folder)


def measure_before(folder: Path, case: Case, seed: int) -> Measured:
    """Answer each held-out row once, at temperature 1 as in rollouts, with the model as it was made. A file of them is
    continued, or used as it is."""
    out = folder / f"before_{case.way}.jsonl"
    flags = {
        **WAYS[case.way],
        "data.path": "held_out.jsonl",
        "out": out,
        "seed": seed,
        "num-samples": 1,
        "max-prompt-tokens": MAX_PROMPT_TOKENS,
        "max-tokens": MAX_RESPONSE_TOKENS,
        "temperature": 1.0,
        "engine": "vllm",
    }
    run(folder, ["sample", "model"], flags)
    return case.task.measure(read_rows(out, case.task.num_held_out))


def train(folder: Path, name: str, case: Case, seed: int, before: Measured) -> Result:
    """Run a case. Its evaluation at the end answers each held-out row once, at temperature 1."""
    directory = folder / f"{name}_{time.strftime('%H%M%S')}"
    flags = {"run.dir": folder, "run.name": directory.name, "run.seed": seed, **settings(case)}
    minutes = run(folder, ["train", case.method], flags)
    *_, evaluation = recorded_steps(directory / "evaluations").values()
    return Result(
        before=before,
        after=case.task.measure(read_rows(evaluation, case.task.num_held_out)),
        lr=case.lr,
        steps=case.num_steps,
        responses=case.prompts * case.group_size,
        minutes=minutes,
    )


def settings(case: Case) -> dict[str, object]:
    """The settings of a run, in the folder of its task."""
    return {
        "policy.model": "model",
        "policy.lr": case.lr,
        "policy.warmup_ratio": 0,
        "data.path": "train.jsonl",
        "data.eval_path": "held_out.jsonl",
        "eval.temperature": 1.0,
        "rollout.engine": "vllm",
        "rollout.temperature": 1.0,
        "rollout.batch_size": case.prompts,
        "rollout.group_size": case.group_size,
        "rollout.max_prompt_tokens": MAX_PROMPT_TOKENS,
        "rollout.max_response_tokens": MAX_RESPONSE_TOKENS,
        "train.num_steps": case.num_steps,
        "checkpoint.every_steps": 1000,
        "checkpoint.keep": 1,
        **WAYS[case.way],
        **case.further,
    }


def run(folder: Path, words: Sequence[str], flags: Mapping[str, object]) -> float:
    """Run one command in the folder, with the user's code, and return its minutes."""
    command = [*words, *(part for key, value in flags.items() for part in (f"--{key}", str(value)))]
    print(f"rlhf {shlex.join(command)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "rlhf.cli.main", *command], cwd=folder, env=environment, check=True)
    return (time.monotonic() - start) / 60
