"""What a run's folder says about the run. Nothing is changed there; what cannot be read is left out, and noted."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from rlhf.errors import ConfigError, DataError
from rlhf.orchestrator.run.files import read_rows
from rlhf.orchestrator.run.metrics_file import read_metrics
from rlhf.types import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run as its folder shows it."""

    folder: Path
    name: str
    """The name of the folder."""
    status: Mapping[str, Json]
    steps: Sequence[Mapping[str, Json]]
    """The metrics of each finished step, with `step`, in order. A step occurs once."""
    events: Sequence[Mapping[str, Json]]
    config: Mapping[str, Json]
    """Setting -> value, as `rollout.group_size`; empty where config.yaml cannot be read."""
    notes: tuple[str, ...]
    """What could not be read, one line each."""

    @property
    def last_step(self) -> int:
        """The last step with metrics; 0 if there is none."""
        return step_of(self.steps[-1]) if self.steps else 0

    def series(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of every step at which the metric is a finite number."""
        found = ((step_of(row), number(row.get(metric))) for row in self.steps)
        return [(step, value) for step, value in found if value is not None]

    @property
    def metrics(self) -> list[str]:
        """Every metric that has a value at some step, sorted."""
        names = {name for row in self.steps for name, value in row.items() if number(value) is not None}
        return sorted(names - {"step", "time"})


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        ConfigError: it is not the folder of a run.
        DataError: one of its files cannot be opened, or its status is damaged.
    """
    if not (folder / "status.json").is_file():
        raise ConfigError(f"{folder}: not the folder of a run: {_missing(folder)}")
    try:
        status = _status(folder / "status.json")
        notes: list[str] = []
        steps = _steps(folder / "metrics.jsonl", notes)
        return RunRecord(
            folder=folder,
            name=folder.resolve().name,
            status=status,
            steps=steps,
            events=read_rows(folder / "events.jsonl"),
            config=_config(folder / "config.yaml", notes),
            notes=tuple(notes),
        )
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be read ({error.strerror or error}).") from error


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs in these folders. Raises ConfigError with every folder that is not a run's; DataError."""
    runs: list[RunRecord] = []
    problems: list[str] = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except DataError:
            raise
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return runs


def names_of(runs: Sequence[RunRecord]) -> list[str]:
    """A short name for each run: that of its folder, with the folder above it where two have the same name."""
    names = [run.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{run.folder.resolve().parent.name}/{name}"
        for run, name in zip(runs, names, strict=True)
    ]


def number(value: Json) -> float | None:
    """A finite number as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return None
    return converted if math.isfinite(converted) else None


def step_of(row: Mapping[str, Json]) -> int:
    """The step of a line of metrics."""
    step = row["step"]
    assert isinstance(step, int)
    return step


def _missing(folder: Path) -> str:
    if not folder.is_dir():
        in_runs = Path("runs") / folder
        hint = f" Did you mean {in_runs}?" if not folder.is_absolute() and in_runs.is_dir() else ""
        return f"{'a file' if folder.exists() else 'no such folder'}.{hint}"
    runs = sorted(path.parent.name for path in folder.glob("*/status.json"))
    if runs:
        return f"it holds runs. Name one of them: {', '.join(runs[:5])}{', ...' if len(runs) > 5 else ''}."
    return "it has no status.json."


def _status(file: Path) -> Mapping[str, Json]:
    try:
        status = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        status = None
    if not isinstance(status, dict) or not isinstance(status.get("status"), str):
        raise DataError(f"{file}: damaged: need a JSON object with a status.")
    return status


def _steps(file: Path, notes: list[str]) -> list[Mapping[str, Json]]:
    """One row a step: of a step that was written twice, the later one."""
    rows = read_metrics(file, notes.append)
    of_step = {row["step"]: row for row in rows if type(row.get("step")) is int}
    num_lines = sum(1 for line in file.read_bytes().splitlines() if line.strip()) if file.is_file() else 0
    num_steps = sum(1 for row in rows if type(row.get("step")) is int)
    if num_steps < num_lines:
        notes.append(
            f"{file}: {num_lines - num_steps} of {num_lines} lines cannot be read (cut off or damaged) and are left out"
        )
    return [of_step[step] for step in sorted(of_step, key=lambda step: (isinstance(step, int), step))]


def _config(file: Path, notes: list[str]) -> dict[str, Json]:
    try:
        content = yaml.safe_load(file.read_bytes())
    except FileNotFoundError:
        notes.append(f"{file}: missing, so settings are not shown")
        return {}
    except (yaml.YAMLError, ValueError, RecursionError):
        notes.append(f"{file}: not YAML, so settings are not shown")
        return {}
    return dict(_flattened(content, "")) if isinstance(content, dict) else {}


def _flattened(section: Mapping[str, Json], prefix: str) -> list[tuple[str, Json]]:
    found: list[tuple[str, Json]] = []
    for key, value in section.items():
        name = f"{prefix}{key}"
        found += _flattened(value, f"{name}.") if isinstance(value, dict) and value else [(name, value)]
    return found
