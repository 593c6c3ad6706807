"""Whether each online method learns: stories that become more joyful, within 60 steps, on real parts.

    python -m benchmarks.learning [METHOD ...] [--seeds 0 1 2] [--steps 60] [--whole]
    python -m benchmarks.learning --lag [--only NAME ...]

Every run is `rlhf train` on the CPU with a vLLM engine, the policy, a reference (where the method has one) and the
reward function as actors of their own, at each method's default settings but for the learning rate. The reward is
the joy of `configs/stories`, between 0 and 1. A run has learned at the first step from which on three steps in a row
have at least twice the untrained model's reward, or half of the way from there to 1. It ends there, unless `--whole`.

`--lag` compares GRPO with rollouts 0, 1 and 4 versions behind, with importance correction and without it, and with what
`rollout.order: ready` allows, over whole runs. RLHF_TEST_DATA names the folder that holds models/stories260k. Results
are added to a JSON file, and the table shows all that it holds.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from benchmarks.tables import show
from rlhf.orchestrator.run.metrics_file import read_metrics
from rlhf.orchestrator.run.trackers import numbers

LEARNING_RATES = {
    "grpo": 5e-4,
    "rloo": 5e-4,
    "reinforce++": 5e-4,
    "reinforce++-baseline": 5e-4,
    "remax": 5e-4,
    "dr-grpo": 5e-4,
    "dapo": 5e-4,
    "gspo": 5e-4,
    "cispo": 5e-4,
    "online-dpo": 3e-4,
    "online-kto": 3e-4,
}
THREE_SEEDS = ("grpo", "online-dpo", "online-kto")
OWN_COMMAND = ("online-dpo", "online-kto")
"""Methods with a command of their own; the others are the family of `rlhf train grpo`."""
IN_A_ROW = 3
LAST = 10
"""Steps that a run's final figures are means of."""
START_S, STEP_S = 60.0, 1.6
"""About how long a run takes to start and end, and each step, on two idle cores."""
READY = ("--rollout.order", "ready")
LAGS: Mapping[str, Sequence[str]] = {
    "0, truncate": (),
    "1, truncate": (),
    "4, truncate": (),
    "1, none": (),
    "4, none": (),
    "1, truncate, ready": READY,
    "1, truncate, ready, partial abort": (*READY, "--rollout.partial", "abort"),
    "1, truncate, ready, oversample 1.25": (*READY, "--rollout.oversample", "1.25"),
}
"""max_lag, importance correction, and what else is set -> flags for the latter. One seed without correction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one run did. Rewards are means of a step's answers."""

    rewards: list[float]
    step_s: float
    figures: dict[str, float]
    """Means over all steps but the first (largest, for names that end in _max)."""

    @property
    def start(self) -> float:
        return self.rewards[0]

    @property
    def final(self) -> float:
        return mean(self.rewards[-LAST:])

    def passed(self, goal: float) -> int | None:
        """First step of `IN_A_ROW` that all reach the goal, from 1."""
        for i in range(len(self.rewards) - IN_A_ROW + 1):
            if min(self.rewards[i : i + IN_A_ROW]) >= goal:
                return i + 1
        return None


def goal_from(start: float) -> float:
    """Twice the untrained reward, or half of the way to the bound."""
    return min(2 * start, (1 + start) / 2)


def command(method: str, seed: int, num_steps: int, run: Path, extra: Sequence[str]) -> list[str]:
    train = method if method in OWN_COMMAND else "grpo"
    config = f"configs/{train.replace('-', '_')}_stories_cpu.yaml"
    flags = {
        "run.dir": run.parent,
        "run.name": run.name,
        "run.seed": seed,
        "policy.model": Path(os.environ["RLHF_TEST_DATA"], "models", "stories260k"),
        "policy.lr": LEARNING_RATES[method],
        "policy.num_gpus_per_node": 1,
        "rollout.num_engines": 1,
        "train.num_steps": num_steps,
        "checkpoint.every_steps": 1000,
        "log.sample_every_steps": 0,
        **({} if method in OWN_COMMAND else {"algo.type": method}),
    }
    parts = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "rlhf.cli.main", "train", train, config, *parts, *extra]


def read_steps(run: Path) -> list[dict[str, float]]:
    return [numbers(step) for step in read_metrics(run / "metrics.jsonl", print)]


def reward_of(step: dict[str, float]) -> float:
    """The source's own score: what a method adds to it, such as a penalty for length, does not count."""
    return step["reward/source/function"]


def train(method: str, seed: int, args: argparse.Namespace, extra: Sequence[str] = (), name: str = "") -> Result:
    """One run, ended where it has learned unless `args.whole`."""
    folder = f"{name or method}_{seed}".replace("+", "p")
    run = (args.out.parent / "learning" / folder).resolve()
    shutil.rmtree(run, ignore_errors=True)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    run.parent.mkdir(parents=True, exist_ok=True)
    with run.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(
            command(method, seed, args.steps, run, extra), env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        stopped = False
        try:
            while process.poll() is None:
                time.sleep(0.5)
                rewards = [reward_of(step) for step in read_steps(run)]
                learned = rewards and Result(rewards=rewards, step_s=0, figures={}).passed(goal_from(rewards[0]))
                if learned and not args.whole and not stopped:
                    process.send_signal(signal.SIGTERM)  # ends with a checkpoint, after the step under way
                    stopped = True
        finally:
            process.terminate()
            code = process.wait()
    if code and not stopped:
        raise SystemExit(f"{method}, seed {seed}: ended with code {code}; see {run.with_suffix('.log')}")
    steps = read_steps(run)
    names = {key for step in steps for key in step}
    figures = {key: [step[key] for step in steps[1:] if step.get(key) is not None] for key in sorted(names)}
    return Result(
        rewards=[reward_of(step) for step in steps],
        step_s=mean(step["time/step"] for step in steps[1:]),
        figures={key: max(x) if key.endswith("_max") else mean(x) for key, x in figures.items() if x},
    )


def keep(path: Path, table: str, name: str, seed: int, result: Result) -> None:
    """Add a run to the JSON file, in place of an older one."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known.setdefault(table, {}).setdefault(name, {})[str(seed)] = asdict(result)
    path.write_text(json.dumps(known, indent=1))


def recall(path: Path, table: str) -> dict[str, dict[str, Result]]:
    known = json.loads(path.read_text()).get(table, {})
    return {name: {seed: Result(**run) for seed, run in runs.items()} for name, runs in known.items()}


def show_methods(path: Path) -> None:
    """The table of methods, each run against the untrained reward of its own first step."""
    runs = recall(path, "methods")
    rows = []
    for method, rate in LEARNING_RATES.items():
        for seed, result in sorted(runs.get(method, {}).items()):
            goal = goal_from(result.start)
            passed = result.passed(goal)
            rows.append(
                [
                    method,
                    f"{rate:g}",
                    seed,
                    str(passed or f"not in {len(result.rewards)}"),
                    str(len(result.rewards)),
                    f"{result.start:.3f}",
                    f"{goal:.3f}",
                    f"{max(mean(result.rewards[i : i + 3]) for i in range(max(1, len(result.rewards) - 2))):.3f}",
                    f"{result.step_s:.2f}",
                ]
            )
    headings = [
        "method",
        "lr",
        "seed",
        "learned at step",
        "steps run",
        "reward, first step",
        "goal",
        "best of 3 in a row",
        "s a step",
    ]
    show("Joy of sampled stories, bound 1", headings, rows)


def show_lags(path: Path) -> None:
    """The table of lags: means and deviations over the seeds."""
    rows = []
    for name, runs in recall(path, "lags").items():
        finals = [result.final for result in runs.values()]
        spread = f" ± {stdev(finals):.3f}" if len(finals) > 1 else ""
        figures = [
            mean(result.figures.get(key, 0.0) for result in runs.values())
            for key in ("mismatch/kl", "mismatch/log_prob", "mismatch/outside_band", "rollout/lag_mean")
        ]
        lag_max = max(result.figures["rollout/lag_max"] for result in runs.values())
        rows.append(
            [
                name,
                ", ".join(sorted(runs)),
                f"{mean(finals):.3f}{spread}",
                *(f"{x:.2g}" for x in figures),
                f"{lag_max:.0f}",
            ]
        )
    headings = [
        "max_lag, correction",
        "seeds",
        f"reward, last {LAST} steps",
        "mismatch/kl",
        "log_prob_gap",
        "outside_band",
    ]
    show("GRPO with rollouts of older weights", [*headings, "lag, mean", "max"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(LEARNING_RATES)}; none: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="by default 0, and 0 1 2 for " + ", ".join(THREE_SEEDS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--whole", action="store_true", help="do not end a run where it has learned")
    parser.add_argument("--lag", action="store_true", help="compare rollouts of older weights instead")
    parser.add_argument("--only", nargs="+", help="of --lag: " + "; ".join(LAGS))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/learning.json"))
    args = parser.parse_args()
    if unknown := set(args.methods) - set(LEARNING_RATES):
        parser.error(f"unknown method {', '.join(unknown)}; have {', '.join(LEARNING_RATES)}")
    if "RLHF_TEST_DATA" not in os.environ:
        parser.error("set RLHF_TEST_DATA to the folder that holds models/stories260k")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.whole |= args.lag
    if args.lag:
        table = "lags"
        seeds = args.seeds or (0, 1, 2)
        runs = [
            (name, "grpo", seed, ["--rollout.max_lag", lag, "--algo.correction.type", kind, *flags])
            for name, flags in LAGS.items()
            if not args.only or name in args.only
            for lag, kind in [name.split(", ")[:2]]
            for seed in (seeds if kind == "truncate" else seeds[:1])
        ]
    else:
        table = "methods"
        runs = [
            (method, method, seed, [])
            for method in args.methods or LEARNING_RATES
            for seed in args.seeds or ((0, 1, 2) if method in THREE_SEEDS else (0,))
        ]
    estimate = len(runs) * (START_S + STEP_S * args.steps * (1.0 if args.whole else 0.6)) / 60
    print(f"{len(runs)} runs, about {estimate:.0f} minutes on two idle cores", flush=True)
    for name, method, seed, extra in runs:
        result = train(method, seed, args, extra, name=name.replace(", ", "_").replace(" ", "_") if args.lag else "")
        keep(args.out, table, name, seed, result)
        print(
            f"{name}, seed {seed}: {result.start:.3f} -> {mean(result.rewards[-3:]):.3f} in {len(result.rewards)} "
            f"steps of {result.step_s:.2f} s",
            flush=True,
        )
    (show_lags if args.lag else show_methods)(args.out)


if __name__ == "__main__":
    main()
