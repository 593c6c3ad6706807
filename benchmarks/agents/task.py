"""What a small model is to learn, and how well it does."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.types import Json

Row = Mapping[str, Json]
"""One response, as `rlhf sample` and evaluations write it."""
Measured = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task. Its folder gets `model`, and rows in `train.jsonl` and `held_out.jsonl`."""

    name: str
    num_held_out: int
    make: Callable[[Path, int], None]
    """Writes its folder, by a seed."""
    measure: Callable[[Sequence[Row]], Measured]
    """Of the responses to the held-out rows."""
    reached: Callable[[Measured, Measured], bool]
    """Whether the goal is reached, by what was measured before training and after."""
    show: Callable[[Measured], str]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path, number: int) -> list[dict[str, Json]]:
    """The responses in a file. Ends the benchmark if they are not `number`."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if len(rows) != number:
        raise SystemExit(f"{path}: {len(rows)} responses instead of {number}")
    return rows


def reward_of(row: Row) -> float:
    """A response's reward. Without a source of rewards, what a loop returned stands in the episode alone."""
    reward = row["reward"]
    return float(str(episode_of(row)["reward"] if reward is None else reward))


def episode_of(row: Row) -> dict[str, Json]:
    episode = row["episode"]
    assert isinstance(episode, dict), "the response has turns"
    return episode
