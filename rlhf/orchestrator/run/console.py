"""What the terminal shows during a run: a live panel on a terminal, one plain line a step elsewhere."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol, TextIO

from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.text import Text

from rlhf.terminal import is_terminal, rich_console, visible, write_line
from rlhf.types import Json, ScoredGroup

SHOWN_METRICS = (
    ("reward", "reward/mean_all"),
    ("kl", "kl/ref_per_response"),
    ("length", "response/length"),
    ("policy loss", "policy/loss"),
    ("critic loss", "critic/loss"),
    ("loss", "reward/loss"),
    ("accuracy", "reward/accuracy"),
    ("eval reward", "eval/reward"),
    ("eval loss", "eval/loss"),
    ("eval accuracy", "eval/accuracy"),
)
"""Label and name of the metrics that are shown, where a step has them."""

PHASES = ("wait", "log_probs", "learn", "sync", "evaluate")
"""Phases of the trainer in a step, one after the other."""
PRODUCER_PHASES = ("generate", "score")
"""Phases of the rollout producer: the trainer waits for them, or with max_lag above 0 they run in parallel."""
MIN_SHOWN_S = 0.005
SAMPLE_CHARACTERS = 600
WINDOW = 20
"""Steps over which the time left is estimated."""


class Console(Protocol):
    """Shows the progress of a run."""

    def log(self, step: int, metrics: Mapping[str, Json]) -> None:
        """Show a step."""
        ...

    def sample(self, step: int, group: ScoredGroup) -> None:
        """Show the first response of a step."""
        ...

    def say(self, text: str) -> None:
        """Show a line."""
        ...

    def close(self) -> None: ...


class SilentConsole:
    """Shows nothing."""

    def log(self, step: int, metrics: Mapping[str, Json]) -> None:
        """Metrics are in metrics.jsonl."""

    def sample(self, step: int, group: ScoredGroup) -> None:
        """Samples are in rollouts/."""

    def say(self, text: str) -> None:
        """Warnings are in events.jsonl."""

    def close(self) -> None:
        """Nothing is open."""


class Progress:
    """Steps done and time left."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.step = 0
        self._seconds: deque[float] = deque(maxlen=WINDOW)

    def add(self, step: int, metrics: Mapping[str, Json]) -> None:
        """Count a step."""
        self.step = step
        seconds = metrics.get("time/step")
        if isinstance(seconds, float):
            self._seconds.append(seconds)

    @property
    def eta(self) -> str:
        """Time left at the pace of the last steps, like 3m20s."""
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else 0.0
        return show_seconds(mean * (self.num_steps - self.step))


class PlainConsole:
    """One line a step."""

    def __init__(self, num_steps: int, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._progress = Progress(num_steps)

    def log(self, step: int, metrics: Mapping[str, Json]) -> None:
        self._progress.add(step, metrics)
        parts = [
            f"step {step}/{self._progress.num_steps}",
            f"eta {self._progress.eta}",
            *_shown_metrics(metrics),
            *_pace(metrics),
        ]
        self.say(" | ".join(parts))

    def sample(self, step: int, group: ScoredGroup) -> None:
        self.say(f"sample of step {step}: {_sample(group)}")

    def say(self, text: str) -> None:
        write_line(text, self._stream)

    def close(self) -> None:
        """Nothing is left open."""


class LiveConsole:
    """A panel that is redrawn in place; samples and messages scroll above it."""

    def __init__(self, num_steps: int, stream: TextIO | None = None) -> None:
        self._progress = Progress(num_steps)
        self._live = Live(console=rich_console(stream), refresh_per_second=4)
        self._live.start()

    def log(self, step: int, metrics: Mapping[str, Json]) -> None:
        self._progress.add(step, metrics)
        bar = ProgressBar(total=self._progress.num_steps, completed=step)
        lines = [Text(" | ".join(_shown_metrics(metrics))), Text(" | ".join(_pace(metrics)))]
        title = f"step {step}/{self._progress.num_steps}, eta {self._progress.eta}"
        self._live.update(Panel(Group(bar, *lines), title=title))

    def sample(self, step: int, group: ScoredGroup) -> None:
        self.say(f"sample of step {step}: {_sample(group)}")

    def say(self, text: str) -> None:
        self._live.console.print(Text(visible(text)))

    def close(self) -> None:
        self._live.stop()


def make_console(num_steps: int, stream: TextIO | None = None) -> Console:
    """A live panel where `stream` (stdout by default) is a terminal."""
    return LiveConsole(num_steps, stream) if is_terminal(stream) else PlainConsole(num_steps, stream)


def show_seconds(seconds: float) -> str:
    """Seconds as 12s, 3m20s or 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _sample(group: ScoredGroup) -> str:
    shown = []
    for text in (group.prompt.text, group.texts[0]):
        escaped = visible(text)
        shown.append(escaped if len(escaped) <= SAMPLE_CHARACTERS else escaped[:SAMPLE_CHARACTERS] + " ...")
    return f"[{shown[0]}] -> [{shown[1]}] reward {group.rewards[0].total:.4g}"


def _shown_metrics(metrics: Mapping[str, Json]) -> list[str]:
    found = [(label, metrics.get(name)) for label, name in SHOWN_METRICS]
    return [f"{label} {value:.4g}" for label, value in found if isinstance(value, int | float)]


def _pace(metrics: Mapping[str, Json]) -> list[str]:
    def number(name: str) -> float | None:
        value = metrics.get(name)
        return float(value) if isinstance(value, int | float) else None

    def seconds(names: Sequence[str]) -> list[str]:
        timed = [(name, number(f"time/{name}") or 0.0) for name in names]
        return [f"{name} {value:.2f}" for name, value in timed if value >= MIN_SHOWN_S]

    produced = ", ".join(seconds(PRODUCER_PHASES))
    shown = ", ".join(
        f"{part} [{produced}]" if produced and part.startswith("wait") else part for part in seconds(PHASES)
    )
    parts = []
    if (total := number("time/step")) is not None:
        parts.append(f"{total:.2f} s ({shown})" if shown else f"{total:.2f} s")
    if (speed := number("throughput/tokens_per_s")) is not None:
        parts.append(f"{speed:.0f} tokens/s")
    if (share := number("throughput/generation_share")) is not None:
        parts.append(f"generation {share:.0%}")
    return parts
