"""Seconds by phase of a PPO step with every real part, and the loop's own overhead.

    python -m benchmarks.ppo_step [--model tiny|25m|FOLDER] [--steps 6]

Runs `rlhf train ppo` (policy, critic, reference, reward function and a vLLM engine as Ray actors), then reads what the
run wrote: the phases of each step from metrics.jsonl, and from the actors' traces when any engine was busy. Overhead is
the share of a step in which no engine was.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from benchmarks.tables import show
from rlhf.engines.models.fresh_model import make_llama, train_tokenizer

PHASES = ("generate", "score", "log_probs", "credit", "learn", "sync")
WARM_UP = 2
"""First steps left out: the first batches compile."""
REWARD = """
def length(prompts, responses):
    return [len(response) / 100 for response in responses]
"""


def make_model(name: str, folder: Path) -> Path:
    """A model by size, made on the spot, or the folder of one that is there."""
    if name not in ("tiny", "25m"):
        return Path(name)
    texts = [f"Story {number} of a cat, a dog and {number * 7} mice." for number in range(500)]
    vocab_size, hidden_size, num_layers = (512, 64, 5) if name == "tiny" else (8192, 384, 12)
    train_tokenizer(texts, 512, folder)
    num_parameters = make_llama(folder, vocab_size=vocab_size, hidden_size=hidden_size, num_layers=num_layers)
    print(f"{name}: {num_parameters / 1e6:.1f} M parameters")
    return folder


def run(model: Path, folder: Path, args: argparse.Namespace) -> None:
    """One PPO run of a few steps."""
    (folder / "bench_rewards.py").write_text(REWARD)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Story {n} of a cat"}) + "\n" for n in range(128)))
    flags = {
        "run.dir": folder,
        "run.name": "ppo",
        "policy.model": model,
        "policy.lr": 1e-5,
        "reward.function": "bench_rewards:length",
        "data.path": prompts,
        "rollout.engine": args.engine,
        "rollout.batch_size": args.prompts,
        "rollout.max_prompt_tokens": 64,
        "rollout.max_response_tokens": args.tokens,
        "train.batch_size": args.prompts // 2,
        "train.num_steps": args.steps + WARM_UP,
        "log.sample_every_steps": 0,
    }
    command = [sys.executable, "-m", "rlhf.cli.main", "train", "ppo"]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    subprocess.run(command, check=True, cwd=folder)


def busy_seconds(spans: Sequence[tuple[float, float]], start: float, end: float) -> float:
    """Length of the union of `spans` within [start, end]."""
    total, reached = 0.0, start
    for span in sorted(spans):
        first, last = max(span[0], reached), min(span[1], end)
        if last > first:
            total += last - first
            reached = last
    return total


def read_spans(run_folder: Path) -> Iterator[tuple[float, float]]:
    """When any engine was busy."""
    for file in run_folder.glob("logs/attempt_*/*.trace.jsonl"):
        for line in file.read_text().splitlines():
            span = json.loads(line)
            yield span["start"], span["end"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="tiny, 25m, or a model's folder")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--engine", default="auto")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(make_model(args.model, folder / "model"), folder, args)
        run_folder = folder / "ppo"
        steps = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
        spans = list(read_spans(run_folder))
    overheads = []
    for step in steps:
        start, end = step["time"] - step["time/step"], step["time"]
        overheads.append(1 - busy_seconds(spans, start, end) / (end - start))
    total = median(step["time/step"] for step in steps)
    rows = []
    for phase in PHASES:
        seconds = median(step.get(f"time/{phase}", 0.0) for step in steps)
        rows.append([phase, f"{seconds:.3f}", f"{seconds / total:.1%}"])
    rows.append(["whole step", f"{total:.3f}", "100.0%"])
    rows.append(["no engine busy", f"{median(overheads) * total:.3f}", f"{median(overheads):.1%}"])
    show(f"PPO step, {args.model}, {args.prompts} answers x {args.tokens} tokens", ["phase", "seconds", "share"], rows)


if __name__ == "__main__":
    main()
