"""What the terminal shows during a run: a live panel on a terminal, one plain line a step elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TextIO

from rlhf.orchestrator.run.live_console import LiveConsole
from rlhf.orchestrator.run.samples_shown import sample_lines
from rlhf.orchestrator.run.shown_metrics import Progress, headline, pace_of, values_of
from rlhf.orchestrator.run.waits import WaitLines, Waits, no_stage
from rlhf.terminal import is_terminal, write_line
from rlhf.types import Json, ScoredGroup


class Console(Protocol):
    """Shows the progress of a run."""

    def log(self, step: int, metrics: Mapping[str, Json]) -> None:
        """Show a step."""
        ...

    def sample(self, step: int, group: ScoredGroup) -> None:
        """Show the best and the worst response of a group."""
        ...

    def say(self, text: str) -> None:
        """Show a line."""
        ...

    def warn(self, text: str) -> None:
        """Show a line that the user should not miss."""
        ...

    def waiting(self, what: str, who: Sequence[str], stage_of: Callable[[str], str] = no_stage) -> None:
        """Show who is awaited, as `Waiting`."""
        ...

    def close(self) -> None: ...


class SilentConsole:
    """Shows nothing."""

    def log(self, step: int, metrics: Mapping[str, Json]) -> None:
        """Metrics are in metrics.jsonl."""

    def sample(self, step: int, group: ScoredGroup) -> None:
        """Samples are in rollouts/."""

    def say(self, text: str) -> None:
        """Events are in events.jsonl."""

    def warn(self, text: str) -> None:
        """Warnings are in events.jsonl."""

    def waiting(self, what: str, who: Sequence[str], stage_of: Callable[[str], str] = no_stage) -> None:
        """Logs say what a process does."""

    def close(self) -> None:
        """Nothing is open."""


class PlainConsole:
    """One line a step."""

    def __init__(self, num_steps: int, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._progress = Progress(num_steps)
        self._waits = Waits()
        self._lines = WaitLines(self._waits, self._say_wait)

    def log(self, step: int, metrics: Mapping[str, Json]) -> None:
        self._progress.add(step, metrics)
        found = headline(metrics)
        parts = [
            f"step {step}/{self._progress.num_steps}",
            f"eta {self._progress.eta}",
            *([f"{found[0]} {found[1]:.4g}"] if found is not None else []),
            *values_of(metrics),
            *pace_of(metrics),
        ]
        self.say(" | ".join(parts))

    def sample(self, step: int, group: ScoredGroup) -> None:
        for line in sample_lines(step, group):
            self.say(line)

    def warn(self, text: str) -> None:
        self.say(text)

    def say(self, text: str) -> None:
        write_line(text, self._stream)

    def waiting(self, what: str, who: Sequence[str], stage_of: Callable[[str], str] = no_stage) -> None:
        self._waits.set(what, who, stage_of)
        self._lines.start()

    def close(self) -> None:
        self._lines.close()

    def _say_wait(self, line: str) -> None:
        """Only before the first step: the lines of steps show that the run goes on."""
        if not self._progress.step:
            self.say(line)


def make_console(num_steps: int, stream: TextIO | None = None) -> Console:
    """A live panel where `stream` (stdout by default) is a terminal."""
    return LiveConsole(num_steps, stream) if is_terminal(stream) else PlainConsole(num_steps, stream)
