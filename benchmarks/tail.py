"""Training and generation side by side, with lengths that have a long tail: GRPO with a vLLM engine on the CPU.

    python -m benchmarks.tail [--pairs 5] [--steps 12] [--size 5m|25m] [--prompts N] [--before FOLDER]

A Llama of 5 or 25 million parameters with random weights ends each response with the same small chance at every token,
so that lengths are geometric, and four times their mean at most. Engine and policy compute with one thread each. Every
case runs once in each round, so that all meet the same machine; the figures are responses a second over all steps but
the first three, as medians of the rounds, and their ratio to `max_lag 0`. `--before` is a checkout of this project
before the stream of groups: its `max_lag 1` is one more case.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.tables import show
from rlhf.engines.models.fresh_model import make_llama, train_tokenizer
from rlhf.orchestrator.run.metrics_file import read_metrics
from rlhf.orchestrator.run.trackers import numbers

ROOT = Path(__file__).parents[1]
MOST_TOKENS = 1024
WARM_UP = 3
TIMEOUT_S = 1800.0
CASES: Mapping[str, Mapping[str, object]] = {
    "max_lag 0": {},
    "max_lag 1, fifo": {"rollout.max-lag": 1},
    "max_lag 1, ready": {"rollout.max-lag": 1, "rollout.order": "ready"},
    "max_lag 2, ready": {"rollout.max-lag": 2, "rollout.order": "ready"},
}
BEFORE = "max_lag 1, batches"


@dataclass(frozen=True, slots=True)
class Size:
    """A model, and a rollout batch with which generation takes about as long as learning."""

    hidden_size: int
    num_layers: int
    num_prompts: int
    group_size: int

    @property
    def num_responses(self) -> int:
        return self.num_prompts * self.group_size


SIZES: Mapping[str, Size] = {"5m": Size(256, 6, 8, 4), "25m": Size(512, 7, 4, 4)}


def write_inputs(folder: Path, size: Size) -> None:
    """The model, prompts and a reward function."""
    train_tokenizer([], 259, folder / "model")
    make_llama(
        folder / "model",
        vocab_size=259,
        hidden_size=size.hidden_size,
        num_layers=size.num_layers,
        context=MOST_TOKENS + 64,
    )
    write_prompts(folder)
    (folder / "letters.py").write_text(
        "def share_of_letters(responses):\n"
        "    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in responses]\n"
    )


def write_prompts(folder: Path) -> None:
    rows = "".join(f'{{"prompt": "tell a story about number {number}"}}\n' for number in range(512))
    (folder / "prompts.jsonl").write_text(rows)


def flags_of(folder: Path, size: Size, name: str, num_steps: int) -> dict[str, object]:
    return {
        "run.dir": folder / "runs",
        "run.name": name,
        "policy.model": folder / "model",
        "policy.lr": 1e-6,
        "data.path": folder / "prompts.jsonl",
        "reward.function": "letters:share_of_letters",
        "rollout.engine": "vllm",
        "rollout.batch-size": size.num_prompts,
        "rollout.group-size": size.group_size,
        "rollout.max-prompt-tokens": 48,
        "rollout.max-response-tokens": MOST_TOKENS,
        "rollout.enforce-eager": "true",
        "rollout.kv-cache-gib": 1.0,
        "train.num-steps": num_steps,
        "train.batch-size": size.num_responses,
        "train.max-tokens-per-micro-batch": 2048,
        "algo.kl.coef": 0.0,
        "checkpoint.every-steps": 1000,
        "log.sample-every-steps": 0,
    }


def run(code: Path, folder: Path, size: Size, name: str, num_steps: int, changes: Mapping[str, object]) -> float:
    """Responses a second."""
    shutil.rmtree(folder / "runs" / name, ignore_errors=True)
    flags = {**flags_of(folder, size, name, num_steps), **changes}
    parts = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    with (folder / f"{name}.log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "rlhf.cli.main", "train", "grpo", *parts],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            check=True,
        )
    steps = [numbers(step) for step in read_metrics(folder / "runs" / name / "metrics.jsonl", print)][WARM_UP:]
    return size.num_responses * len(steps) / sum(step["time/step"] for step in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="rounds of all cases")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--size", choices=SIZES, default="5m")
    parser.add_argument("--prompts", type=int, help="prompts a step; fewer: less to learn beside the same tail")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/tail"))
    parser.add_argument("--only", nargs="+", default=[])
    options = parser.parse_args()
    folder, size = options.folder.resolve(), SIZES[options.size]
    size = replace(size, num_prompts=options.prompts or size.num_prompts)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_inputs(folder, size)
    cases = [(name, ROOT, changes) for name, changes in CASES.items() if not options.only or name in options.only]
    if options.before is not None:
        cases.insert(1, (BEFORE, options.before.resolve(), {"rollout.max-lag": 1}))
    found: dict[str, list[float]] = {name: [] for name, _, _ in cases}
    for number in range(options.pairs):
        for name, code, changes in cases:
            label = f"{name.replace(' ', '_').replace(',', '')}-{number}"
            rate = run(code, folder, size, label, options.steps, changes)
            found[name].append(rate)
            print(f"{name}: {rate:.3f} responses a second", flush=True)
    base = median(found[cases[0][0]])
    rows = [
        [name, f"{median(rates):.2f}", f"{min(rates):.2f}-{max(rates):.2f}", f"{median(rates) / base:.2f}"]
        for name, rates in found.items()
    ]
    show("GRPO with geometric lengths", ["case", "responses/s, median", "range", "beside max_lag 0"], rows)


if __name__ == "__main__":
    main()
