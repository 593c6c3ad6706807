"""Whom a run waits for, and for how long: shown while the run starts, and where a wait in a step is long."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rlhf.orchestrator.run.shown_metrics import show_seconds

LEAST_SHOWN_S = 2.0
"""A shorter wait is not shown before the first step."""
LEAST_SHOWN_IN_STEPS_S = 30.0
"""The same once steps are finished: each of them waits many times."""
FIRST_LINE_S = 10.0
EVERY_S = 30.0
MAX_NAMED = 4


class Waiting(Protocol):
    """Is told who is awaited."""

    def __call__(self, what: str, who: Sequence[str], stage_of: Callable[[str], str] = ...) -> None:
        """`who` is awaited in `what`, until the next call for the same: nobody any longer if it is empty. `stage_of`
        says of a name what it does now, if that is known."""
        ...


def no_stage(name: str) -> str:
    """Nothing is known about what a process does."""
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wait:
    who: tuple[str, ...]
    since: float
    stage_of: Callable[[str], str]


class Waits:
    """The waits that are under way. Thread-safe: several threads of a driver wait at the same time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waits: dict[str, _Wait] = {}
        self._lock = threading.Lock()

    def set(self, what: str, who: Sequence[str], stage_of: Callable[[str], str] = no_stage) -> None:
        """As `Waiting`."""
        with self._lock:
            before = self._waits.pop(what, None)
            if who:
                since = before.since if before is not None else self._clock()
                self._waits[what] = _Wait(who=tuple(who), since=since, stage_of=stage_of)

    def line(self, least_s: float = LEAST_SHOWN_S) -> str:
        """The wait that began first, as one line; empty if none is as old as `least_s` seconds."""
        with self._lock:
            waits = sorted(self._waits.items(), key=lambda item: item[1].since)
        for what, wait in waits:
            age = self._clock() - wait.since
            if age >= least_s:
                named = [_with_stage(name, wait.stage_of) for name in wait.who[:MAX_NAMED]]
                more = f" and {len(wait.who) - MAX_NAMED} more" if len(wait.who) > MAX_NAMED else ""
                return f"waiting for {', '.join(named)}{more}: {what}, {show_seconds(age)}"
        return ""


class WaitLines:
    """Writes a line about a wait that is ten seconds old, and every thirty seconds while it lasts."""

    def __init__(self, waits: Waits, say: Callable[[str], None], *, first_s: float = FIRST_LINE_S) -> None:
        self._waits = waits
        self._say = say
        self._first_s = first_s
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Watch from now on, once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="waits", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        pause_s = self._first_s
        while not self._closed.wait(pause_s):
            line = self._waits.line(self._first_s)
            pause_s = EVERY_S if line else self._first_s / 4
            if line:
                self._say(line)


def _with_stage(name: str, stage_of: Callable[[str], str]) -> str:
    stage = stage_of(name)
    return f"{name} ({stage})" if stage else name
