"""The state of a run as its folder shows it, whether it runs, ended or broke off. Nothing is changed there."""

import contextlib
import json
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rlhf.config.loading.yaml_text import Document
from rlhf.errors import ConfigError, RlhfError, error_classes
from rlhf.orchestrator.run.causes import WINDOW, find_causes
from rlhf.orchestrator.run.files import read_rows
from rlhf.orchestrator.run.metrics_file import read_metrics
from rlhf.orchestrator.run.run_directory import newest_processes
from rlhf.types import Json

LAST = 20
"""Steps whose time is usual."""
SILENT = 10.0
"""A run is silent when its last step is older than so many usual ones."""
SHOWN = 5
FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>\S+)')
OURS = re.compile(r"rlhf/(engines|algorithms)/.*$")
TROUBLE = re.compile(r"error|exception|killed|out of memory|traceback|fatal", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The state of a run, for a person."""

    headline: str
    facts: tuple[str, ...]
    causes: tuple[str, ...]
    """Why the run does not learn, by its last steps."""
    warnings: tuple[str, ...]
    troubles: Mapping[str, tuple[str, ...]]
    """Process -> the last lines of its log that report an error."""
    stack_tops: Mapping[str, str]
    """Process -> the line of code at which it was, when it last wrote its stacks."""
    advice: str | None


def diagnose(folder: Path, now: float | None = None) -> Diagnosis:
    """Read a run's folder. Damaged lines are skipped.

    Raises:
        ConfigError: it is not the folder of a run.
    """
    status = _json(folder / "status.json")
    if not isinstance(status, dict) or "status" not in status:
        raise ConfigError(f"doctor: {folder} is not a run's folder: no status.json there.")
    now = time.time() if now is None else now
    old_names: list[str] = []
    steps = read_metrics(folder / "metrics.jsonl", old_names.append)
    events = read_rows(folder / "events.jsonl")
    alive = _is_alive(status)
    broke_off = status["status"] == "running" and alive is False
    error = status.get("error")
    return Diagnosis(
        headline=_headline(status, alive, broke_off),
        facts=(*_progress(status, steps, now), *_saved(folder)),
        causes=tuple(cause.text for cause in find_causes(steps[-WINDOW:], _config(folder))),
        warnings=(*_warnings(events), *old_names),
        troubles=_troubles(folder, status) if broke_off or error else {},
        stack_tops=_stack_tops(folder),
        advice=_advice(error, broke_off),
    )


def _headline(status: Mapping[str, Json], alive: bool | None, broke_off: bool) -> str:
    how = f"{status['status']}"
    if broke_off:
        how = "broke off: it says running, and its process is gone (killed, or the machine went down)"
    elif status["status"] == "running":
        how = f"running as pid {status.get('pid')} on {status.get('host')}"
        how += "" if alive else ", which is not this machine: whether it is alive cannot be checked"
    attempt = status.get("attempt")
    again = f", attempt {attempt}" if isinstance(attempt, int) and attempt > 1 else ""
    error = f"\n{' '.join(str(status['error']).split())}" if status.get("error") else ""
    return f"{how}{again}: step {status.get('step')} of {status.get('num_steps')}{error}"


def _is_alive(status: Mapping[str, Json]) -> bool | None:
    """Whether the driver's process is there; None where it ran on another machine."""
    pid = status.get("pid")
    if status.get("host") != socket.gethostname() or not isinstance(pid, int):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _progress(status: Mapping[str, Json], steps: Sequence[Mapping[str, Json]], now: float) -> list[str]:
    """Seconds a step, whether the run is silent, and how its metrics changed."""
    if not steps:
        return ["no step is finished."]
    seconds = [value for step in steps[-LAST:] if isinstance(value := step.get("time/step"), int | float)]
    usual = median(seconds) if seconds else 0.0
    last = steps[-1].get("time")
    age = now - last if isinstance(last, int | float) else 0.0
    facts = [f"a step takes {usual:.3g} s; the last one, {steps[-1].get('step')}, ended {_duration(age)} ago."]
    if status["status"] == "running" and age > max(60.0, SILENT * usual):
        facts.append(f"silent: no step for {_duration(age)}, {age / max(usual, 1e-9):.0f} times the usual.")
    for name in ("reward/mean", "pairs/accuracy", "policy/loss", "reward/loss", "mismatch/log_prob"):
        values = [value for step in steps if isinstance(value := step.get(name), int | float)]
        if len(values) > 1:
            facts.append(f"{name}: {values[0]:.4g} at first, {values[-1]:.4g} now.")
    slow = {
        name.removeprefix("time/"): value
        for name, value in steps[-1].items()
        if name.startswith("time/") and name not in ("time/step", "time/wait") and isinstance(value, int | float)
    }
    if slow:
        most = sorted(slow.items(), key=lambda item: -item[1])[:3]
        facts.append("the last step's time: " + ", ".join(f"{name} {value:.3g} s" for name, value in most) + ".")
    return facts


def _saved(folder: Path) -> list[str]:
    """Which checkpoints exist, and whether the model does."""
    numbers = sorted(int(path.parent.name[5:]) for path in folder.glob("checkpoints/step_*/manifest.json"))
    shown = ", ".join(map(str, numbers)) or "none"
    facts = [f"checkpoints with a manifest: {shown}."]
    if (folder / "model" / "config.json").is_file():
        facts.append(f"the trained model is in {folder / 'model'}.")
    return facts


def _warnings(events: Sequence[Mapping[str, Json]]) -> tuple[str, ...]:
    """How many events of each kind there were, and the last ones."""
    counts = Counter(str(event.get("kind")) for event in events)
    if not counts:
        return ()
    counted = ", ".join(f"{number} {kind}" for kind, number in counts.most_common())
    return (f"{len(events)} events ({counted}); the last:", *(f"  {event.get('text')}" for event in events[-SHOWN:]))


def _troubles(folder: Path, status: Mapping[str, Json]) -> dict[str, tuple[str, ...]]:
    """The last lines that report an error, of each log of the last attempt."""
    found = {}
    for log in sorted(folder.glob(f"logs/attempt_{status.get('attempt')}/*.log")):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        troubled = tuple(line.strip() for line in lines if TROUBLE.search(line))[-SHOWN:]
        if troubled:
            found[log.stem.replace("_", " ")] = troubled
    return found


def _stack_tops(folder: Path) -> dict[str, str]:
    """Where each process of the last launch was, by the stacks that it wrote."""
    tops = {}
    for process in newest_processes(folder):
        with contextlib.suppress(OSError):
            if text := Path(process.stacks).read_text(encoding="utf-8", errors="replace"):
                tops[process.name] = top_of_stack(text)
    return tops


def top_of_stack(stacks: str) -> str:
    """Where a process is: the innermost line of this package in any of its threads, and the function it waits in.

    `stacks` is what faulthandler writes: threads are separated by empty lines, the innermost frame comes first.
    """
    for thread in stacks.split("\n\n"):
        frames = list(FRAME.finditer(thread))
        for frame in frames:
            if file := OURS.search(frame["file"]):
                place = f"in {frame['function']} ({file[0]}:{frame['line']})"
                deepest = frames[0]
                inside = f", inside it in {deepest['function']} ({Path(deepest['file']).name})"
                return place if deepest is frame else place + inside
    return "waits for work"


def _advice(error: Json, broke_off: bool) -> str | None:
    if broke_off:
        return "Continue with --resume: nothing past the last checkpoint is kept."
    if not isinstance(error, str):
        return None
    kinds = {kind.__name__: kind for kind in error_classes()}
    return kinds.get(error.split(":")[0], RlhfError).advice


def _duration(seconds: float) -> str:
    """Seconds in the largest unit that fits, as 2.5 h."""
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _config(folder: Path) -> Mapping[str, Json]:
    """The run's resolved config; empty where it cannot be read."""
    try:
        config = Document((folder / "config.yaml").read_text(encoding="utf-8")).value
    except (OSError, ValueError):
        return {}
    return dict(config) if isinstance(config, dict) else {}


def _json(file: Path) -> Json:
    try:
        content: Json = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content
