"""What a run trains on and what it holds out, divided by prompt."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rlhf.errors import DataError
from rlhf.terminal import counted
from rlhf.types import IntArray, Prompt, ScoredGroup

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSplit(Generic[T]):
    """The rows of a run. No prompt is on both sides. `dropped` counts the rows left out, by reason; `fingerprint` is
    the sha256 of everything a model sees of either side, in order."""

    train: tuple[T, ...]
    held_out: tuple[T, ...]
    dropped: Mapping[str, int]
    fingerprint: str

    def require(self, num_rows: int, key: str) -> None:
        """Raise DataError where there are fewer training rows than the `num_rows` that config key `key` asks for."""
        if len(self.train) < num_rows:
            raise DataError(too_few_rows(len(self.train), key, num_rows))


def too_few_rows(num_rows: int, key: str, asked: int) -> str:
    """What to say of rows that are fewer than the config key `key` asks for."""
    return f"data: {counted(num_rows, 'row')} < {key} {asked}. Lower {key} or add rows."


def prompt_key(text: str) -> str:
    """What makes two prompts the same for a split: their words, whatever the case and the spaces between."""
    return " ".join(text.casefold().split())


def held_out_keys(keys: Sequence[str], fraction: float, seed: int) -> set[str]:
    """The prompts to hold out: `fraction` of the different ones, at least one of them, never all.

    A prompt's rank depends on the seed and on its own text, not on the order or number of rows.
    """
    distinct = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())
    if fraction == 0.0:
        return set()
    if len(distinct) < 2:
        raise DataError("data.eval_fraction: one prompt cannot be divided; set data.eval_path.")
    return set(distinct[: min(max(round(fraction * len(distinct)), 1), len(distinct) - 1)])


def divide(rows: Sequence[T], keys: Sequence[str], held_out: set[str]) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """Rows to train on, and rows whose prompt is held out; each in the order given."""
    pairs = list(zip(rows, keys, strict=True))
    train = tuple(row for row, key in pairs if key not in held_out)
    return train, tuple(row for row, key in pairs if key in held_out)


def fingerprint(sides: Sequence[Sequence[T]], content: Callable[[T], bytes]) -> str:
    """sha256 of what each item of each side holds, in order."""
    digest = hashlib.sha256()
    for side in sides:
        digest.update(len(side).to_bytes(8, "little"))
        for item in side:
            digest.update(hashlib.sha256(content(item)).digest())
    return digest.hexdigest()


def prompt_content(prompt: Prompt) -> bytes:
    """Everything that a run can learn from a prompt, as bytes."""
    described = json.dumps([prompt.id, prompt.label, dict(prompt.metadata)], sort_keys=True)
    return described.encode() + _token_bytes(prompt.token_ids)


def group_content(group: ScoredGroup) -> bytes:
    """Everything that a run can learn from a data set's responses, as bytes."""
    rewards = json.dumps([[reward.total for reward in group.rewards], group.margins])
    responses = b"".join(_token_bytes(response.token_ids) for response in group.responses)
    return prompt_content(group.prompt) + rewards.encode() + responses


def _token_bytes(token_ids: IntArray) -> bytes:
    return len(token_ids).to_bytes(8, "little") + token_ids.astype("<i8").tobytes()
