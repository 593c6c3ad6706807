"""Agents learn on a CPU: small models learn to call a calculator and to play a game, on real parts.

    python -m benchmarks.agents [--only CASE ...] [--seed 0] [--folder runs/benchmarks/agents]

Plain supervised learning makes a model within a minute that seldom does the right thing. Then `rlhf train` runs on
other rows, with a vLLM engine, the policy, and what else the method has as actors of their own.

What is printed is how it does on rows that were never trained on, each answered once at temperature 1 as in rollouts:
before by `rlhf sample`, after by the evaluation at the end of the run. Cases:

    grpo, ppo, online-dpo   multiply numbers, with a calculator as a tool (`rollout.tools`); the reward is 1 for the
                            exact product. The goal: from at most 30 % to at least 90 % exact
    openai, anthropic       the same by GRPO, in a loop of one's own (`rollout.agent`) with these clients
    game                    guess a number from 1 to 100 (`rollout.environment`) by GRPO, in at most 8 turns. The goal:
                            at most 1.3 guesses more than binary search on average, where a lost game counts as 9

Results are added to a JSON file, and the table shows all that it holds. The exit code is 1 if a case missed its goal.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.agents.cases import CASES
from benchmarks.agents.running import Result, make_task, measure_before, train
from benchmarks.agents.task import Measured
from benchmarks.tables import show


def show_results(path: Path) -> bool:
    """Print all results of a file, and return whether all goals were reached."""
    results = {name: Result(**result) for name, result in json.loads(path.read_text()).items()}
    rows, missed = [], []
    for name, case in CASES.items():
        if name not in results:
            continue
        found = results[name]
        if not case.task.reached(found.before, found.after):
            missed.append(name)
        before, after = case.task.show(found.before), case.task.show(found.after)
        numbers = [f"{found.lr:g}", f"{found.responses}", f"{found.steps}", before, after, f"{found.minutes:.1f}"]
        rows.append([case.about, *numbers])
    headings = ["case", "lr", "responses a step", "steps", "before", "after", "minutes"]
    show("Held-out rows before and after training", headings, rows)
    print(f"missed their goal: {', '.join(missed) or 'none'}")
    return not missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/agents"))
    args = parser.parse_args()
    folder = (args.folder / f"seed_{args.seed}").resolve()
    path = folder / "results.json"
    before: dict[str, Measured] = {}
    for name in args.only or CASES:
        case = CASES[name]
        task_folder = folder / case.task.name
        make_task(case.task, task_folder, args.seed)
        if case.way not in before:
            before[case.way] = measure_before(task_folder, case, args.seed)
            print(f"{case.way}, before: {case.task.show(before[case.way])}", flush=True)
        result = train(task_folder, name, case, args.seed, before[case.way])
        print(f"{name}, after: {case.task.show(result.after)}", flush=True)
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, name: asdict(result)}, indent=1))
    return 0 if show_results(path) else 1


if __name__ == "__main__":
    sys.exit(main())
