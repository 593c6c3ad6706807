"""What a slow reward costs beside generation, and what a call that hangs costs: GRPO with a vLLM engine on the CPU.

    python -m benchmarks.slow_reward [--rounds 3] [--steps 12]

The inputs are those of `benchmarks.tail`. The reward function returns at once, or sleeps a second a call; the figure is
the median step over all rounds, without the first three steps. In the last case one of two processes hangs in a call
until its deadline of 10 s, in a run at `max_lag` 2 that takes what is ready: its groups are scored again, and the steps
that end meanwhile are counted.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from benchmarks import tail
from benchmarks.tables import show
from benchmarks.tail import ROOT, SIZES, TIMEOUT_S, WARM_UP, flags_of
from rlhf.orchestrator.run.files import read_rows
from rlhf.orchestrator.run.metrics_file import read_metrics
from rlhf.orchestrator.run.trackers import numbers

SIZE = SIZES["5m"]
DEADLINE_S = 10.0
CASES = (("0", "at_once"), ("0", "in_a_second"), ("1", "at_once"), ("1", "in_a_second"))
REWARDS = f"""\
import time
from pathlib import Path

scored = 0


def at_once(responses):
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in responses]


def in_a_second(responses):
    time.sleep(1.0)
    return at_once(responses)


def hanging_once(responses):
    global scored
    scored += len(responses)
    told = Path(__file__).with_name("hung")
    if scored > {2 * SIZE.num_responses} and not told.exists():
        told.write_text(str(time.time()))
        time.sleep(3600.0)
    return at_once(responses)
"""


def write_inputs(folder: Path) -> None:
    """What `benchmarks.tail` needs, and reward functions."""
    tail.write_inputs(folder, SIZE)
    (folder / "slow.py").write_text(REWARDS)


def run(folder: Path, name: str, num_steps: int, function: str, changes: Mapping[str, object]) -> Path:
    """The folder of a run."""
    source = f"[{{type: function, function: 'slow:{function}', timeout_s: {DEADLINE_S}}}]"
    flags = {**flags_of(folder, SIZE, name, num_steps), **changes, "reward.sources": source}
    del flags["reward.function"]
    with (folder / f"{name}.log").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "rlhf.cli.main", "train", "grpo"]
            + [part for key, value in flags.items() for part in (f"--{key}", str(value))],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            check=True,
        )
    return folder / "runs" / name


def steps_of(run: Path) -> list[dict[str, float]]:
    return [numbers(step) for step in read_metrics(run / "metrics.jsonl", print)]


def report_sleeping(folder: Path, rounds: int, num_steps: int) -> None:
    """Run the cases in turn, and show their median steps."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in CASES}
    for number in range(rounds):
        for case in CASES:
            max_lag, function = case
            made = run(folder, f"{function}-{max_lag}-{number}", num_steps, function, {"rollout.max-lag": max_lag})
            found[case] += steps_of(made)[WARM_UP:]
            print(f"max_lag {max_lag}, {function}: {middle(found[case], 'time/step'):.2f} s a step", flush=True)
    rows = []
    for case, steps in found.items():
        step_s, base_s = middle(steps, "time/step"), middle(found[(case[0], "at_once")], "time/step")
        generated_s, waited_s = middle(steps, "time/generate"), middle(steps, "time/wait")
        rows.append([*case, *(f"{seconds:.2f}" for seconds in (step_s, generated_s, waited_s, step_s - base_s))])
    show("A reward function that sleeps", ["max_lag", "reward", "step, s", "generate", "wait", "more, s"], rows)


def report_hanging(folder: Path, num_steps: int) -> None:
    """Run with a call that hangs, and show what was learned meanwhile."""
    changes = {"rollout.max-lag": 2, "rollout.order": "ready", "reward.concurrency": 2}
    made = run(folder, "hanging", num_steps, "hanging_once", changes)
    began = float((folder / "hung").read_text())
    steps, ends = steps_of(made), [float(str(row["time"])) for row in read_rows(made / "metrics.jsonl")]
    meanwhile = [step for step, end in zip(steps, ends, strict=True) if began < end < began + DEADLINE_S]
    repairs = [row for row in read_rows(made / "events.jsonl") if row["kind"] == "repair"]
    row = [
        f"{middle(steps[WARM_UP:], 'time/step'):.2f}",
        f"{max(step['time/step'] for step in steps[WARM_UP:]):.2f}",
        str(len(meanwhile)),
        str(len(repairs)),
        f"{max(step['rollout/lag_max'] for step in steps):.0f}",
    ]
    headers = ["step, s", "longest step", f"steps in the {DEADLINE_S:g} s", "repairs", "lag, max"]
    show("A call that hangs", headers, [row])


def middle(steps: Sequence[Mapping[str, float]], name: str) -> float:
    return median(step.get(name, 0.0) for step in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/slow_reward"))
    options = parser.parse_args()
    folder = options.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_inputs(folder)
    report_sleeping(folder, options.rounds, options.steps)
    report_hanging(folder, options.steps)


if __name__ == "__main__":
    main()
