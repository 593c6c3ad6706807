"""Our half: `rlhf train METHOD` as a user runs it, on Ray, DeepSpeed and vLLM (or the transformers engine)."""

import json
import sys
from pathlib import Path
from statistics import median

from benchmarks.beside_trl.cases import ONLINE, PROMPT_TOKENS, Case
from benchmarks.beside_trl.figures import WARM_UP, Figures

OUTCOMES = {"rm": "reward/loss", "grpo": "reward/mean_all", "online-dpo": "reward/mean_all"}


def command(case: Case, folder: Path, engine: str) -> list[str]:
    """The command line of one run, which leaves its folder in `folder`/ours."""
    trained = "reward" if case.method == "rm" else "policy"
    flags: dict[str, object] = {
        "run.dir": folder,
        "run.name": "ours",
        "run.seed": case.seed,
        f"{trained}.model": folder / "model",
        f"{trained}.lr": case.lr,
        f"{trained}.lr_schedule": "constant",
        f"{trained}.warmup_ratio": 0.0,
        f"{trained}.adam_betas": "[0.9,0.999]",
        "data.path": folder / "rows.jsonl",
        "data.shuffle": False,
        "train.num_steps": case.num_steps,
        "train.batch_size": case.shape.num_answers // (2 if case.method == "online-dpo" else 1),
        "checkpoint.every_steps": 100_000,
        "log.sample_every_steps": 0,
    }
    if case.method in ONLINE:
        flags |= {
            "reward.function": "benchmarks.beside_trl.cases:even_share",
            "rollout.engine": engine,
            "rollout.batch_size": case.num_rows_a_step,
            "rollout.group_size": case.group_size,
            "rollout.max_prompt_tokens": PROMPT_TOKENS,
            "rollout.max_response_tokens": case.max_tokens,
        }
    parts = [
        part
        for name, value in flags.items()
        for part in (f"--{name}", str(value).lower() if value is False else str(value))
    ]
    return [sys.executable, "-m", "rlhf.cli.main", "train", case.method, *parts]


def read(case: Case, folder: Path, started: float) -> Figures:
    """The figures of the run in `folder`/ours, whose process started at `started` (seconds since 1970)."""
    steps = [json.loads(line) for line in (folder / "ours" / "metrics.jsonl").read_text().splitlines()]
    warm = steps[WARM_UP:]
    names = sorted({name for step in warm for name in step if name.startswith("time/")})
    online = case.method in ONLINE
    return Figures(
        step_seconds=[step["time/step"] for step in steps],
        outcome=[step[OUTCOMES.get(case.method, "policy/loss")] for step in steps],
        startup_s=steps[0]["time"] - steps[0]["time/step"] - started,
        length_mean=sum(step["response/length"] for step in steps) / len(steps) if online else 0.0,
        length_max=max(step["response/length_max"] for step in steps) if online else 0.0,
        phases={name[5:]: median(step.get(name, 0.0) for step in warm) for name in names},
    )
