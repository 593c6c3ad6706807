"""`rlhf compare`: runs side by side in the terminal, and which one did best."""

import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf.config.tools import CompareConfig
from rlhf.errors import ConfigError, DataError
from rlhf.orchestrator.run.console import visible
from rlhf.report.comparison import Comparison, cautions, compare
from rlhf.report.config_difference import config_difference
from rlhf.report.measures import OTHERS, RESULTS, Measured, direction, measured
from rlhf.report.run_record import RunRecord, read_run
from rlhf.types import Json

SHOWN_OF_VALUE = 60


def run_compare(config: CompareConfig) -> int:
    """Print the comparison. Returns the exit code.

    Raises:
        ConfigError: a folder is not a run's, or no run has a metric that was asked for.
        DataError: a file cannot be read, or no run has finished a step.
    """
    runs = read_runs(config.runs)
    if not any(run.steps for run in runs):
        raise DataError("compare: none of the runs has finished a step, so there is nothing to compare.")
    metrics = chosen_metrics(runs, config.metrics)
    for run in runs:
        sys.stderr.writelines(f"rlhf: warning: {visible(note)}\n" for note in run.notes)
    if config.as_json:
        sys.stdout.write(json.dumps(as_json(runs, metrics), indent=1) + "\n")
    else:
        show(runs, metrics, Console(highlight=False))
    return 0


def read_runs(folders: Sequence[str]) -> list[RunRecord]:
    """The runs in these folders. Raises ConfigError with every folder that is not a run's; DataError."""
    runs: list[RunRecord] = []
    problems: list[str] = []
    for folder in folders:
        try:
            runs.append(read_run(Path(folder)))
        except DataError:
            raise
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return runs


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


def names_of(runs: Sequence[RunRecord]) -> list[str]:
    """A short name for each run: that of its folder, with the folder above it where two have the same name."""
    names = [run.name for run in runs]
    return [
        visible(name if names.count(name) == 1 else f"{run.folder.resolve().parent.name}/{name}")
        for run, name in zip(runs, names, strict=True)
    ]


def show(runs: Sequence[RunRecord], metrics: Sequence[str], console: Console) -> None:
    """Print metrics, differing settings, and the result."""
    names = names_of(runs)
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
    for line in result_lines(runs, compare(runs), names):
        console.print(escape(line), soft_wrap=True)


def result_lines(runs: Sequence[RunRecord], found: Comparison | None, names: Sequence[str]) -> list[str]:
    """Which run did best and by how much, and why that may not be so."""
    if found is None:
        return ["The runs have no metric in common that says which of them did better."]
    winner, second = names[found.winner], names[found.second]
    noise = "" if found.error is None else f" ± {found.error:.2g}"
    values = f"{found.metric} {found.values[0]:.4g} against {found.values[1]:.4g} of {second}"
    difference = f"{values}: {found.difference:.3g}{noise} better ({found.basis})"
    if found.is_clear:
        first = f"{winner} is ahead: {difference}."
    elif found.difference == 0:
        first = f"No difference: {found.metric} is {found.values[0]:.4g} in {winner} and {second} ({found.basis})."
    else:
        first = f"No clear winner: {winner} has {difference}, which noise can explain."
    return [first, *(f"Caution: {line}." for line in cautions(runs, found))]


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
