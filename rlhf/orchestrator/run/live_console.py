"""A live panel on a terminal, redrawn in place; samples and messages scroll above it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from rlhf.orchestrator.run.samples_shown import sample_lines
from rlhf.orchestrator.run.shown_metrics import Progress, headline, pace_of, values_of
from rlhf.orchestrator.run.waits import LEAST_SHOWN_IN_STEPS_S, LEAST_SHOWN_S, Waits, no_stage
from rlhf.terminal import rich_console, visible
from rlhf.types import Json, ScoredGroup

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-~=+*#"
GAP = "  "
BORDER_CELLS = 4
MAX_CURVE_CELLS = 60


class RunPanel:
    """What the panel shows, in the width that there is: the bar, the headline with its curve over the run, the other
    metrics, the times of the last step, who is awaited, and the last warning.

    Its colors are those of the terminal's own theme, so that it can be read on dark and on light ground.
    """

    def __init__(self, num_steps: int) -> None:
        self.waits = Waits()
        self._progress = Progress(num_steps)
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None, style="dim", complete_style="green", finished_style="green"),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("eta {task.fields[eta]}"),
            expand=True,
        )
        self._task = self._bar.add_task("steps", total=num_steps, eta="?")
        self._metrics: Mapping[str, Json] = {}
        self._curve: list[float] = []
        self._warning = ""

    def log(self, step: int, metrics: Mapping[str, Json]) -> None:
        """Show a step."""
        self._progress.add(step, metrics)
        self._bar.update(self._task, completed=step, eta=self._progress.eta)
        self._metrics = metrics
        if (found := headline(metrics)) is not None:
            self._curve.append(found[1])

    def warn(self, text: str) -> None:
        """Keep a warning in sight until the next one."""
        self._warning = text

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Iterator[RenderableType]:
        width = max(options.max_width - BORDER_CELLS, 1)
        lines: list[RenderableType] = [self._bar.get_renderable()]
        if self._metrics:
            lines += self._headline(width, options.ascii_only)
            lines += [Text(line) for line in fill_lines(values_of(self._metrics), width)]
            lines += [Text(line, style="dim") for line in fill_lines(pace_of(self._metrics), width)]
        if waiting := self.waits.line(LEAST_SHOWN_IN_STEPS_S if self._metrics else LEAST_SHOWN_S):
            lines.append(Text(waiting, style="cyan", no_wrap=True, overflow="ellipsis"))
        if self._warning:
            lines.append(Text(self._warning, style="yellow", no_wrap=True, overflow="ellipsis"))
        yield Panel(Group(*lines))

    def _headline(self, width: int, ascii_only: bool) -> list[Text]:
        """The headline and its curve."""
        if (found := headline(self._metrics)) is None:
            return []
        label, value = found
        line = Text.assemble((label, "bold"), " ", (f"{value:.4g}", "bold"), GAP)
        room = min(width - line.cell_len, MAX_CURVE_CELLS)
        line.append(curve(self._curve, room, ASCII_BLOCKS if ascii_only else BLOCKS), style="green")
        return [line]


class LiveConsole:
    """The panel of a run on a terminal."""

    def __init__(self, num_steps: int, stream: TextIO | None = None) -> None:
        self._panel = RunPanel(num_steps)
        self._live = Live(self._panel, console=rich_console(stream), refresh_per_second=4)
        self._live.start()

    def log(self, step: int, metrics: Mapping[str, Json]) -> None:
        self._panel.log(step, metrics)
        self._live.refresh()

    def sample(self, step: int, group: ScoredGroup) -> None:
        for line in sample_lines(step, group):
            self.say(line)

    def warn(self, text: str) -> None:
        self._panel.warn(text)
        self.say(text)

    def say(self, text: str) -> None:
        self._live.console.print(Text(visible(text)))

    def waiting(self, what: str, who: Sequence[str], stage_of: Callable[[str], str] = no_stage) -> None:
        self._panel.waits.set(what, who, stage_of)

    def close(self) -> None:
        self._live.stop()


def curve(values: Sequence[float], width: int, blocks: str = BLOCKS) -> str:
    """`values` as a curve of at most `width` characters, from the lowest block to the highest; each character is the
    mean of as many neighbors as it takes to fit. Values that are not finite are left out."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or width < 1:
        return ""
    size = math.ceil(len(finite) / width)
    means = [sum(part) / len(part) for part in (finite[i : i + size] for i in range(0, len(finite), size))]
    low, high = min(means), max(means)
    if high <= low:
        return blocks[0] * len(means)
    return "".join(blocks[round((mean - low) / (high - low) * (len(blocks) - 1))] for mean in means)


def fill_lines(parts: Sequence[str], width: int) -> list[str]:
    """`parts` side by side, on as many lines of `width` cells as they take. A part is broken only where it is longer
    than a line itself."""
    lines: list[str] = []
    for part in parts:
        if lines and cell_len(lines[-1]) + len(GAP) + cell_len(part) <= width:
            lines[-1] += GAP + part
        else:
            lines.append(part)
    return lines
