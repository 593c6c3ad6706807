"""A step as bars on a line of time: the trainer's phases, the rollout producer's, and the calls of every worker."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.report.curves import short
from rlhf.report.run_record import RunRecord, number, step_of
from rlhf.types import Json

TRAINER = ("record", "checkpoint", "wait", "log_probs", "credit", "learn", "sync", "ema_reference", "evaluate")
"""The trainer's phases in their order. Writing the records and the checkpoint of a step counts in the next one."""
BEFORE_WAIT = ("record", "checkpoint")
PRODUCER = ("generate", "score")
"""The rollout producer's phases. They run while the trainer waits, or beside all of its phases with max_lag above 0."""
NUM_SLOWEST = 3
MOST_STEPS = 60
MOST_BARS = 400
"""Most bars of one worker in one step."""
READ_OF_TRACES = 64 * 2**20
"""Most bytes that are read of all workers' traces together: the end of each."""
TOLERANCE = 1.05
"""Phases of the producer that take longer than this share of the wait did not run during it alone."""

Window = tuple[float, float]
"""Start and end, in seconds since 1970."""
Bar = tuple[str, float, float]
"""Name, start and end, in seconds from the start of the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call that a worker executed."""

    name: str
    start: float
    """Seconds since 1970."""
    end: float


def timelines(run: RunRecord, steps: Sequence[int]) -> list[dict[str, Json]]:
    """The lines of these steps, of the first, the middle and the last, and of the slowest ones, by step."""
    timed = {step_of(row): row for row in run.steps if number(row.get("time/step")) is not None}
    if not timed:
        return []
    slowest = sorted(timed, key=lambda step: -(number(timed[step].get("time/step")) or 0.0))[:NUM_SLOWEST]
    known = list(timed)
    chosen = [known[0], known[len(known) // 2], known[-1], *slowest, *(step for step in steps if step in timed)]
    shown = sorted(set(list(dict.fromkeys(chosen))[:MOST_STEPS]))
    windows = {step: _window(timed[step]) for step in shown}
    traces = _traces(run.folder, [window for window in windows.values() if window is not None])
    found = []
    for step in shown:
        rows = [*phase_rows(timed[step]), *_worker_rows(windows[step], traces)]
        found.append(_as_json(step, number(timed[step].get("time/step")) or 0.0, rows, is_slow=step in slowest))
    return found


def phase_rows(row: Mapping[str, Json]) -> list[tuple[str, list[Bar]]]:
    """The bars of the trainer and, where responses were sampled, of the producer. Phases are recorded by their lengths:
    the trainer's follow each other, and what no phase explains comes last."""
    lengths = {name.removeprefix("time/"): value for name in row if (value := number(row[name])) is not None}
    total = lengths.get("step", 0.0)
    bars: list[Bar] = []
    for name in TRAINER:
        if lengths.get(name, 0.0) > 0:
            start = bars[-1][2] if bars else 0.0
            bars.append((name, start, start + lengths[name]))
    end = bars[-1][2] if bars else 0.0
    if total > end:
        bars.append(("other", end, total))
    before = sum(lengths.get(name, 0.0) for name in BEFORE_WAIT)
    produced = sum(lengths.get(name, 0.0) for name in PRODUCER)
    if not produced:
        return [("trainer", bars)]
    inside = produced <= TOLERANCE * lengths.get("wait", 0.0)
    start = before if inside else 0.0
    made: list[Bar] = []
    for name in PRODUCER:
        length = lengths.get(name, 0.0)
        made.append((name, start, start + length))
        start += length
    return [("trainer", bars), ("rollouts" if inside else "rollouts (beside training; start not recorded)", made)]


def _window(row: Mapping[str, Json]) -> Window | None:
    """When the step was, by the time at which its line was written."""
    end, length = number(row.get("time")), number(row.get("time/step"))
    return None if end is None or length is None else (end - length, end)


def _traces(folder: Path, windows: Sequence[Window]) -> dict[str, list[Call]]:
    """Worker -> its calls that touch one of the windows, over all attempts of the run, in order."""
    files = sorted(folder.glob("logs/attempt_*/*.trace.jsonl"))
    found: dict[str, list[Call]] = {}
    for file in files:
        of_worker = found.setdefault(file.name.removesuffix(".trace.jsonl"), [])
        for call in _calls(file, READ_OF_TRACES // len(files)):
            if any(call.end > first and call.start < last for first, last in windows):
                of_worker.append(call)
    return {name: sorted(calls, key=lambda call: call.start) for name, calls in sorted(found.items())}


def _calls(file: Path, max_bytes: int) -> Iterator[Call]:
    """The calls of a trace, from its last `max_bytes`."""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - max_bytes))
        lines = opened.read(max_bytes).splitlines()
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(row, dict):
            continue
        start, end = number(row.get("start")), number(row.get("end"))
        if start is not None and end is not None and end >= start:
            yield Call(name=str(row.get("call")), start=start, end=end)


def _worker_rows(window: Window | None, traces: Mapping[str, Sequence[Call]]) -> list[tuple[str, list[Bar]]]:
    """The calls of each worker during a step, in its time."""
    if window is None:
        return []
    first, last = window
    rows = []
    for worker, calls in traces.items():
        bars = [
            (call.name, max(call.start, first) - first, min(call.end, last) - first)
            for call in calls
            if call.end > first and call.start < last
        ]
        if bars:
            rows.append((worker, merged(bars, (last - first) / 1000)))
    return rows


def merged(bars: Sequence[Bar], gap: float) -> list[Bar]:
    """Neighbors of the same name that are no more than `gap` apart as one bar; at most MOST_BARS, the first ones."""
    found: list[Bar] = []
    for name, start, end in bars:
        if found and found[-1][0] == name and start - found[-1][2] <= gap:
            found[-1] = (name, found[-1][1], max(end, found[-1][2]))
        else:
            found.append((name, start, end))
    return found[:MOST_BARS]


def _as_json(step: int, seconds: float, rows: Sequence[tuple[str, Sequence[Bar]]], *, is_slow: bool) -> dict[str, Json]:
    return {
        "step": step,
        "seconds": short(seconds),
        "is_slow": is_slow,
        "rows": [
            {"name": name, "bars": [[bar, short(start), short(end)] for bar, start, end in bars]} for name, bars in rows
        ],
    }
