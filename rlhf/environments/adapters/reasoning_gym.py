"""Tasks of reasoning-gym as rows, and their own verifier as a reward function.

python -m rlhf.environments.adapters.reasoning_gym chain_sum leg_counting --num-rows 500 --out tasks.jsonl
rlhf train grpo ... --data.path tasks.jsonl --reward.function rlhf.environments.adapters.reasoning_gym:score
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import reasoning_gym
from reasoning_gym.utils import extract_answer

ASKED = "Write the final answer between <answer> and </answer>."


def score(response: str, task: Mapping[str, Any]) -> float:
    """What the verifier of a row's task gives for an answer, from 0 to 1: the text between the last <answer> tags, or
    all of the response where there are none."""
    answer = extract_answer(response)
    tasks = _tasks(task["name"], int(task["seed"]), int(task["size"]), task["options"])
    return float(tasks.score_answer(response.strip() if answer is None else answer, tasks[int(task["index"])]))


def rows(names: Sequence[str], num_rows: int, seed: int, options: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """`num_rows` tasks of each name. A row says how its task is made again, exactly: metadata of tasks may hold what
    JSON does not."""
    written = json.dumps(options, sort_keys=True)
    for name in names:
        tasks = _tasks(name, seed, num_rows, written)
        for index in range(num_rows):
            yield {
                "prompt": f"{tasks[index]['question']}\n{ASKED}",
                "answer": tasks[index]["answer"],
                "task": {"name": name, "seed": seed, "size": num_rows, "index": index, "options": written},
            }


@cache
def _tasks(name: str, seed: int, size: int, options: str) -> Any:
    return reasoning_gym.create_dataset(name, seed=seed, size=size, **json.loads(options))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write rows to a file."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description="Tasks of reasoning-gym as rows.")
    parser.add_argument("names", nargs="+", metavar="TASK")
    parser.add_argument("--num-rows", type=int, default=500, help="tasks of each name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", type=json.loads, default={}, help='settings of the tasks, as {"min_terms": 2}')
    parser.add_argument("--out", type=Path, required=True, help="file of rows (.jsonl)")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in reasoning_gym.factory.DATASETS]
    if unknown:
        parser.error(f"no task {', '.join(unknown)}; have {', '.join(sorted(reasoning_gym.factory.DATASETS))}")
    made = rows(given.names, given.num_rows, given.seed, given.options)
    lines = (json.dumps(row, ensure_ascii=False) for row in made)
    given.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
