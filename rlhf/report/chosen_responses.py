"""Which recorded responses a page holds: those of the first, the middle and the last step, those that were asked for,
and as many others, spread over the run, as there is room for."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rlhf.errors import ConfigError
from rlhf.report.curves import short
from rlhf.report.responses_file import RecordedResponse, read_responses, recorded_steps
from rlhf.report.run_record import RunRecord
from rlhf.types import Json

KINDS = ("rollouts", "evaluations")
"""The folders of responses: those that were learned from, and those to held-out prompts."""
SHOWN_OF_TEXT = 20_000
"""Most characters of a prompt or a response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A file of responses: its run's place among the runs, its kind and its step."""

    run: int
    kind: str
    step: int
    file: Path


def choose_responses(runs: Sequence[RunRecord], asked: Sequence[int], max_bytes: int) -> list[dict[str, Json]]:
    """Blocks of responses for a page, by run, kind and step. `max_bytes` bounds them together, but not those of steps
    that were asked for.

    Raises:
        ConfigError: a step that was asked for is recorded in no run.
        DataError: a file cannot be read.
    """
    lists = [
        [Place(run=number, kind=kind, step=step, file=file) for step, file in recorded_steps(run.folder / kind).items()]
        for number, run in enumerate(runs)
        for kind in KINDS
    ]
    _require_recorded(asked, sorted({place.step for places in lists for place in places}))
    wanted = [place for places in lists for place in places if place.step in asked]
    chosen = {place: _block(place) for place in wanted}
    ends = [place for places in lists for place in _ends(places) if place not in chosen]
    left = max_bytes
    for place in ends:
        block = _shortened(_block(place), max_bytes // len(ends))
        left -= _size(block)
        chosen[place] = block
    for place in _in_turn([_halvings(places) for places in lists]):
        if place not in chosen:
            block = _block(place)
            left -= _size(block)
            if left < 0:
                break
            chosen[place] = block
    return [chosen[place] for place in sorted(chosen, key=lambda one: (one.run, KINDS.index(one.kind), one.step))]


def _require_recorded(asked: Sequence[int], recorded: Sequence[int]) -> None:
    problems = []
    for step in asked:
        if step not in recorded:
            near = min(recorded, key=lambda other: abs(other - step), default=None)
            hint = "no responses are recorded (log.rollouts)." if near is None else f"the nearest is {near}."
            problems.append(f"steps: no run has responses of step {step}; {hint}")
    if problems:
        raise ConfigError(problems)


def _ends(places: Sequence[Place]) -> list[Place]:
    """The first, the middle and the last."""
    return list(dict.fromkeys(places[index] for index in (0, len(places) // 2, -1))) if places else []


def _halvings(places: Sequence[Place]) -> Iterator[Place]:
    """All of them, so that any first part is spread over the whole."""
    width = len(places)
    seen = set()
    while width >= 1:
        for index in range(0, len(places), width):
            if index not in seen:
                seen.add(index)
                yield places[index]
        width //= 2


def _in_turn(orders: Sequence[Iterator[Place]]) -> Iterator[Place]:
    waiting = list(orders)
    while waiting:
        for order in list(waiting):
            place = next(order, None)
            if place is None:
                waiting.remove(order)
            else:
                yield place


def _block(place: Place) -> dict[str, Json]:
    groups = groupby(read_responses(place.file), key=lambda row: row.group)
    shown = [_group(list(rows)) for _, rows in groups]
    return {"run": place.run, "kind": place.kind, "step": place.step, "groups": [*shown], "num_groups": len(shown)}


def _group(rows: Sequence[RecordedResponse]) -> dict[str, Json]:
    """A group with its responses, those with the highest reward first, those without a reward last."""
    ranked = sorted(rows, key=lambda row: (row.reward is None, -(row.reward or 0.0)))
    first = rows[0]
    return {
        "id": first.prompt_id,
        "prompt": _cut(first.prompt),
        "label": None if first.label is None else _cut(first.label),
        "columns": _columns(first.columns),
        "rows": [_row(row) for row in ranked],
    }


def _row(row: RecordedResponse) -> dict[str, Json]:
    return {
        "text": _cut(row.response),
        "reward": _short(row.reward),
        "parts": {name: _short(value) for name, value in row.parts.items()},
        "advantage": _short(row.advantage),
        "stop": row.finish_reason,
        "tokens": row.num_tokens,
        "version": row.weight_version,
    }


def _columns(columns: Mapping[str, Json]) -> dict[str, Json]:
    """The columns as text."""
    return {
        name: _cut(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in columns.items()
    }


def _cut(text: str) -> str:
    hidden = len(text) - SHOWN_OF_TEXT
    return text if hidden <= 0 else f"{text[:SHOWN_OF_TEXT]}\n[{hidden} more characters]"


def _short(value: float | None) -> float | None:
    return None if value is None else short(value)


def _shortened(block: dict[str, Json], max_bytes: int) -> dict[str, Json]:
    """As many of the block's groups as fit, at least one."""
    groups = block["groups"]
    assert isinstance(groups, list)
    kept: list[Json] = []
    for group in groups:
        max_bytes -= _size(group)
        if kept and max_bytes < 0:
            break
        kept.append(group)
    return {**block, "groups": kept}


def _size(value: Json) -> int:
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"))
