"""Metrics as curves that a page can draw: thousands of steps become at most a thousand points."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.report.measures import Points
from rlhf.report.run_record import RunRecord, number, step_of
from rlhf.types import Json

MAX_POINTS = 1000
"""More than a chart has pixels. A run with more steps has a point for every few steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A metric of a run. Where points stand for several steps, `low` and `high` are the least and largest value among
    them, so that no spike is lost; else they are empty."""

    steps: tuple[int, ...]
    """The last step of each point."""
    means: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


def curves(run: RunRecord) -> dict[str, Curve]:
    """Metric -> its curve, of every metric with a value."""
    points: dict[str, list[tuple[int, float]]] = {}
    for row in run.steps:
        step = step_of(row)
        for name, value in row.items():
            if name not in ("step", "time") and (finite := number(value)) is not None:
                points.setdefault(name, []).append((step, finite))
    return {name: curve(found) for name, found in sorted(points.items())}


def curve(points: Points, max_points: int = MAX_POINTS) -> Curve:
    """Means over equally many neighboring points, at most `max_points` of them; the last one may be over fewer."""
    width = -(-len(points) // max_points)
    if width <= 1:
        return Curve(steps=tuple(step for step, _ in points), means=tuple(short(value) for _, value in points))
    parts = [points[start : start + width] for start in range(0, len(points), width)]
    values = [[value for _, value in part] for part in parts]
    return Curve(
        steps=tuple(part[-1][0] for part in parts),
        means=tuple(short(sum(part) / len(part)) for part in values),
        low=tuple(short(min(part)) for part in values),
        high=tuple(short(max(part)) for part in values),
    )


def short(value: float) -> float:
    """Six digits: all that a chart or table shows, in a third of the bytes."""
    return float(f"{value:.6g}")


def as_json(found: Sequence[dict[str, Curve]]) -> dict[str, Json]:
    """The curves of several runs, by metric. Lists of steps that many curves share are stored once."""
    steps: dict[tuple[int, ...], int] = {}
    names = sorted({name for of_run in found for name in of_run})
    metrics: list[Json] = []
    for name in names:
        of_runs: list[Json] = []
        for of_run in found:
            one = of_run.get(name)
            if one is None:
                of_runs.append(None)
                continue
            place = steps.setdefault(one.steps, len(steps))
            of_runs.append({"x": place, "y": [*one.means], "low": [*one.low], "high": [*one.high]})
        metrics.append({"name": name, "runs": of_runs})
    return {"steps": [[*one] for one in steps], "metrics": metrics}
