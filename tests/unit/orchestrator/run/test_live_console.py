"""The live panel, on terminals of several widths."""

import io
import re
from typing import Literal

import pytest
from rich.cells import cell_len
from rich.console import Console as RichConsole

from rlhf.orchestrator.run.console import PlainConsole, make_console
from rlhf.orchestrator.run.live_console import ASCII_BLOCKS, BLOCKS, LiveConsole, RunPanel, curve, fill_lines
from rlhf.types import Json

pytestmark = pytest.mark.timeout(30)

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLOR = re.compile(r"\x1b\[([0-9;]+)m")

METRICS: dict[str, Json] = {
    "reward/mean_all": 0.5,
    "kl/ref_per_response": 1.25,
    "response/length": 42.0,
    "response/truncated": 0.75,
    "groups/zero_std": 0.125,
    "policy/loss": 0.0,
    "policy/grad_norm": 0.375,
    "time/generate": 3.0,
    "time/wait": 3.01,
    "time/learn": 1.0,
    "time/step": 5.0,
    "throughput/tokens_per_s": 3400.0,
    "throughput/generation_share": 0.6,
}
SHOWN = (
    "12/40",
    "eta 2m20s",
    "reward 0.5",
    "kl 1.25",
    "length 42",
    "truncated 75%",
    "equal groups 12%",
    "grad norm 0.375",
    "learn 1.00",
    "3400 tokens/s",
    "generation 60%",
    "warning: all responses cut",
)


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def drawn(width: int, *, has_colors: bool = True) -> str:
    """The panel after twelve steps and a warning."""
    out = Terminal()
    panel = RunPanel(40)
    for step in range(1, 13):
        panel.log(step, METRICS | {"reward/mean_all": 0.5 * step / 12})
    panel.warn("warning: all responses cut at 64 tokens")
    color_system: Literal["standard"] | None = "standard" if has_colors else None
    RichConsole(file=out, force_terminal=True, width=width, color_system=color_system).print(panel)
    return out.getvalue()


@pytest.mark.parametrize("has_colors", [True, False])
@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_every_metric_is_on_the_panel(width: int, has_colors: bool) -> None:
    """With colors rich draws the whole bar: what stood behind it on its line was cut off."""
    text = CONTROL.sub("", drawn(width, has_colors=has_colors))
    words = " ".join(re.sub(r"[│╭╮╰╯─━╸╺]", " ", text).split())
    assert [shown for shown in SHOWN if shown not in words] == []
    assert "policy loss" not in words
    assert {cell_len(line) for line in text.splitlines()} == {width}


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_the_whole_panel_is_on_a_terminal_of_that_width(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    console = make_console(40, out)
    assert isinstance(console, LiveConsole)
    console.log(12, METRICS)
    console.warn("warning: all responses cut at 64 tokens")
    console.close()
    last = CONTROL.sub("", out.getvalue()).rpartition("╭")[2]
    words = " ".join(re.sub(r"[│╭╮╰╯─━╸╺]", " ", last).split())
    assert [shown for shown in SHOWN if shown not in words] == []


def test_colors_are_those_of_the_theme() -> None:
    """Neither black nor white, and no ground: the same panel on dark and on light terminals."""
    codes = {code for found in COLOR.findall(drawn(100)) for code in found.split(";")}
    assert codes <= {"0", "1", "2", "32", "33", "35", "36"}
    assert "32" in codes


def test_elsewhere_a_step_is_a_line() -> None:
    out = io.StringIO()
    console = make_console(40, out)
    assert isinstance(console, PlainConsole)
    console.log(12, METRICS)
    console.warn("warning: all responses cut at 64 tokens")
    assert out.getvalue() == (
        "step 12/40 | eta 2m20s | reward 0.5 | kl 1.25 | length 42 | grad norm 0.375 | truncated 75% | "
        "equal groups 12% | 5.00 s (wait 3.01 [generate 3.00], learn 1.00) | 3400 tokens/s | generation 60%\n"
        "warning: all responses cut at 64 tokens\n"
    )


@pytest.mark.parametrize(
    ("metrics", "line"),
    [
        ({"policy/loss": 2.5, "policy/grad_norm": 1.0}, "loss 2.5  "),
        ({"policy/loss": 0.693, "pairs/accuracy": 0.5}, "accuracy 0.5  "),
        ({"reward/loss": 0.693, "reward/accuracy": 0.625}, "accuracy 0.625  "),
        ({"reward/mean_all": 0.25, "policy/loss": 0.0}, "reward 0.25  "),
    ],
)
def test_the_headline_is_what_says_most(metrics: dict[str, Json], line: str) -> None:
    panel = RunPanel(4)
    panel.log(1, metrics)
    out = io.StringIO()
    RichConsole(file=out, width=80).print(panel)
    assert out.getvalue().splitlines()[2].strip("│ ").startswith(line.rstrip())


def test_a_curve_rises_from_the_lowest_block_to_the_highest() -> None:
    assert curve([0, 1, 2, 3, 4, 5, 6, 7], 10) == BLOCKS
    assert curve([3.0, float("nan"), 3.0], 10) == BLOCKS[0] * 2
    assert curve([0.0, 1.0], 10, ASCII_BLOCKS) == "_#"
    assert curve([], 10) == curve([1.0], 0) == ""


def test_a_long_curve_is_one_of_means() -> None:
    rises = curve([step / 1000 for step in range(1000)], 40)
    assert len(rises) == 40
    assert (rises[0], rises[-1]) == (BLOCKS[0], BLOCKS[-1])
    assert list(rises) == sorted(rises)


def test_parts_fill_lines() -> None:
    assert fill_lines(["ab", "cd", "efgh", "漢字漢字"], 8) == ["ab  cd", "efgh", "漢字漢字"]
    assert fill_lines([], 8) == []
