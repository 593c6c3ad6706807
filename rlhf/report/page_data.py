"""Everything that the page of a report shows, but the responses, as one JSON value."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf import __version__
from rlhf.orchestrator.run.diagnosis import Diagnosis, diagnose
from rlhf.report.chosen_responses import KINDS
from rlhf.report.comparison import cautions, compare, result_lines
from rlhf.report.config_difference import config_difference
from rlhf.report.curves import as_json, curves
from rlhf.report.measures import OTHERS, RESULTS, direction
from rlhf.report.responses_file import recorded_steps
from rlhf.report.run_record import RunRecord, number
from rlhf.report.timeline import timelines
from rlhf.report.verdict import Verdict, judge
from rlhf.types import Json

MOST_EVENTS = 500
"""Most events of a run on the page: the last ones."""
SHOWN_OF_EVENT = 2000
"""Most characters of an event's text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageData:
    """What the page shows."""

    content: Mapping[str, Json]
    lines: list[str]
    """What it begins with."""


def page_data(runs: Sequence[RunRecord], names: Sequence[str], steps: Sequence[Sequence[int]]) -> PageData:
    """The page of these runs, which it calls by `names`. `steps`: those of each run whose time is shown at least."""
    diagnoses = [diagnose(run.folder) for run in runs]
    verdicts = [judge(run, diagnosis) for run, diagnosis in zip(runs, diagnoses, strict=True)]
    known = {name for run in runs for name in run.metrics}
    first = [name for name in RESULTS if name in known and direction(name, runs)]
    comparison = _comparison(runs, names)
    content: dict[str, Json] = {
        "version": __version__,
        "made": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "runs": [_run(*parts) for parts in zip(runs, names, diagnoses, verdicts, steps, strict=True)],
        "comparison": [*comparison],
        "settings": _settings(runs),
        "first": [*first, *(name for name in OTHERS if name in known)],
        "curves": as_json([curves(run) for run in runs]),
    }
    prefixes = [f"{name}: " if len(runs) > 1 else "" for name in names]
    lines = [f"{prefix}{verdict.line}" for prefix, verdict in zip(prefixes, verdicts, strict=True)]
    return PageData(content=content, lines=[*comparison, *lines])


def _run(run: RunRecord, name: str, diagnosis: Diagnosis, verdict: Verdict, steps: Sequence[int]) -> dict[str, Json]:
    return {
        "name": name,
        "folder": str(run.folder),
        "line": verdict.line,
        "ended": verdict.ended,
        "moved": [*verdict.moved],
        "wrong": [*verdict.wrong],
        "facts": [*diagnosis.facts],
        "troubles": {process: [*lines] for process, lines in diagnosis.troubles.items()},
        "events": [_event(event) for event in run.events[-MOST_EVENTS:]],
        "num_events": len(run.events),
        "config": _config_text(run.folder),
        "num_recorded": sum(len(recorded_steps(run.folder / kind)) for kind in KINDS),
        "timelines": [*timelines(run, steps)],
    }


def _event(event: Mapping[str, Json]) -> Json:
    step = event.get("step")
    return {
        "step": step if type(step) is int else None,
        "kind": str(event.get("kind")),
        "text": str(event.get("text"))[:SHOWN_OF_EVENT],
        "time": number(event.get("time")),
    }


def _comparison(runs: Sequence[RunRecord], names: Sequence[str]) -> list[str]:
    if len(runs) < 2:
        return []
    found = compare(runs)
    return result_lines(found, [] if found is None else cautions(runs, found), names)


def _settings(runs: Sequence[RunRecord]) -> Json:
    return {name: [*values] for name, values in config_difference(runs).items()} if len(runs) > 1 else {}


def _config_text(folder: Path) -> str:
    """config.yaml as it was written; empty where it cannot be read."""
    try:
        return (folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
