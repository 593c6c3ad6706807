"""Reading rollouts/*.jsonl and evaluations/*.jsonl."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.errors import DataError
from rlhf.orchestrator.run.files import read_rows
from rlhf.report.run_record import number
from rlhf.types import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedResponse:
    """A line of a rollouts or evaluations file. None: not recorded, or without a value."""

    group: int
    prompt_id: str
    prompt: str
    response: str
    reward: float | None
    label: str | None
    columns: Mapping[str, Json]
    parts: Mapping[str, float | None]
    advantage: float | None
    finish_reason: str
    num_tokens: int | None
    weight_version: int | None


def recorded_steps(folder: Path) -> dict[int, Path]:
    """Step -> its file, by step. Empty where the folder is missing."""
    found = ((re.fullmatch(r"step_(\d+)\.jsonl", file.name), file) for file in folder.glob("step_*.jsonl"))
    return dict(sorted((int(match[1]), file) for match, file in found if match is not None))


def read_responses(file: Path) -> list[RecordedResponse]:
    """The responses of a step, in the order in which they were recorded. Lines that are damaged are left out.

    Raises:
        DataError: the file cannot be opened.
    """
    try:
        rows = read_rows(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error}).") from error
    return [_response(row, group) for row, group in zip(rows, _groups(rows), strict=True)]


def _groups(rows: Sequence[Mapping[str, Json]]) -> Iterator[int]:
    """The group of each row. Files of older versions do not number groups: there, rows in a row with the same prompt
    are one."""
    before: Json = None
    counted = -1
    for row in rows:
        counted += counted < 0 or row.get("prompt_id") != before
        before = row.get("prompt_id")
        given = row.get("group")
        yield given if isinstance(given, int) else counted


def _response(row: Mapping[str, Json], group: int) -> RecordedResponse:
    parts, columns, label = row.get("parts"), row.get("columns"), row.get("label")
    return RecordedResponse(
        group=group,
        prompt_id=_text(row.get("prompt_id")),
        prompt=_text(row.get("prompt")),
        response=_text(row.get("response")),
        reward=number(row.get("reward")),
        label=None if label is None else _text(label),
        columns=columns if isinstance(columns, dict) else {},
        parts={name: number(value) for name, value in parts.items()} if isinstance(parts, dict) else {},
        advantage=number(row.get("advantage")),
        finish_reason=_text(row.get("finish_reason")),
        num_tokens=_whole(row.get("num_tokens")),
        weight_version=_whole(row.get("weight_version")),
    )


def _text(value: Json) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def _whole(value: Json) -> int | None:
    return value if type(value) is int else None
