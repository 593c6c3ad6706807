"""`rlhf compare`: runs side by side in the terminal, and which one did best."""

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf.config.tools import CompareConfig
from rlhf.errors import ConfigError, DataError
from rlhf.report.comparison import cautions, compare, result_lines
from rlhf.report.config_difference import config_difference
from rlhf.report.measures import OTHERS, RESULTS, Measured, direction, measured
from rlhf.report.run_record import RunRecord, names_of, read_runs
from rlhf.terminal import rich_console, tell, visible, write
from rlhf.types import Json

SHOWN_OF_VALUE = 60


def run_compare(config: CompareConfig) -> int:
    """Print the comparison. Returns the exit code.

    Raises:
        ConfigError: a folder is not a run's, or no run has a metric that was asked for.
        DataError: a file cannot be read, or no run has finished a step.
    """
    runs = read_runs([Path(folder) for folder in config.runs])
    if not any(run.steps for run in runs):
        raise DataError("compare: none of the runs has finished a step, so there is nothing to compare.")
    metrics = chosen_metrics(runs, config.metrics)
    for run in runs:
        tell(f"rlhf: warning: {note}" for note in run.notes)
    if config.as_json:
        write(json.dumps(as_json(runs, metrics), indent=1) + "\n")
    else:
        show(runs, metrics, rich_console())
    return 0


def chosen_metrics(runs: Sequence[RunRecord], asked: Sequence[str]) -> list[str]:
    """The metrics that were asked for, else those that say how a run did, if any run has them."""
    known = sorted({name for run in runs for name in run.metrics})
    problems = []
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            problems.append(f"metrics: no run has {visible(name)}.{f' Did you mean {near[0]}?' if near else ''}")
    if problems:
        raise ConfigError(problems)
    return list(asked) or [name for name in (*RESULTS, *OTHERS) if name in known]


def show(runs: Sequence[RunRecord], metrics: Sequence[str], console: Console) -> None:
    """Print metrics, differing settings, and the result."""
    names = [visible(name) for name in names_of(runs)]
    table = Table(title="At the end of each run (best value of one step, and its step)")
    table.add_column("")
    for name in names:
        table.add_column(escape(name), justify="right")
    table.add_row("status", *(escape(_status(run)) for run in runs))
    for metric in metrics:
        sign = direction(metric, runs)
        table.add_row(escape(visible(metric)), *(_cell(measured(run.series(metric), metric, sign)) for run in runs))
    console.print(table)
    differing = config_difference(runs)
    if differing:
        settings = Table(title="Settings that differ")
        settings.add_column("")
        for name in names:
            settings.add_column(escape(name))
        for key, values in differing.items():
            settings.add_row(escape(visible(key)), *(escape(_value(value)) for value in values))
        console.print(settings)
    else:
        console.print("All settings are the same.")
    found = compare(runs)
    for line in result_lines(found, [] if found is None else cautions(runs, found), names):
        console.print(escape(line), soft_wrap=True)


def as_json(runs: Sequence[RunRecord], metrics: Sequence[str]) -> dict[str, Json]:
    """The comparison as JSON values."""
    found = compare(runs)
    result: Json = None
    if found is not None:
        result = {
            "metric": found.metric,
            "winner": str(runs[found.winner].folder),
            "second": str(runs[found.second].folder),
            "values": list(found.values),
            "difference": found.difference,
            "standard_error": found.error,
            "is_clear": found.is_clear,
            "basis": found.basis,
            "cautions": list(cautions(runs, found)),
        }
    return {
        "runs": [_run_as_json(run, metrics, runs) for run in runs],
        "settings": {key: list(values) for key, values in config_difference(runs).items()},
        "result": result,
    }


def _run_as_json(run: RunRecord, metrics: Sequence[str], runs: Sequence[RunRecord]) -> dict[str, Json]:
    found = {metric: measured(run.series(metric), metric, direction(metric, runs)) for metric in metrics}
    return {
        "folder": str(run.folder),
        "status": run.status["status"],
        "last_step": run.last_step,
        "metrics": {
            metric: {"last": one.last, "num_averaged": one.num_averaged, "best": one.best, "best_step": one.best_step}
            for metric, one in found.items()
            if one is not None
        },
    }


def _status(run: RunRecord) -> str:
    return f"{visible(str(run.status['status']))}, step {run.last_step}"


def _cell(one: Measured | None) -> str:
    if one is None:
        return "-"
    return f"{one.last:.4g}" + ("" if one.best is None else f" ({one.best:.4g} at {one.best_step})")


def _value(value: Json) -> str:
    text = visible(value if isinstance(value, str) else json.dumps(value))
    return text if len(text) <= SHOWN_OF_VALUE else text[:SHOWN_OF_VALUE] + "..."
