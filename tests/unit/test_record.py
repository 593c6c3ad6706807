"""The script that records a terminal and draws it: what is on the screen, and frames that a browser can show."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from scripts.record import MAX_FRAMES, Screen, chosen, draw, frames_of, record

pytestmark = pytest.mark.timeout(60)
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("one\r\ntwo", ["one", "two"]),
        ("12345\rab", ["ab345"]),
        ("old line\r\x1b[2Knew", ["new"]),
        ("a\r\nb\r\n\x1b[1A\x1b[2Kc", ["a", "c", ""]),
        ("\x1b[?25l\x1b]0;title\x07\x1b[1;31mred\x1b[0m plain", ["red plain"]),
        ("abc\x1b[K", ["abc"]),
        ("abcdef\r\x1b[K", [""]),
    ],
)
def test_a_screen_shows_what_a_terminal_would(data: str, expected: list[str]) -> None:
    screen = Screen()
    screen.feed(data)
    assert [line.plain for line in screen.lines()] == expected


def test_styles_stay_with_their_text() -> None:
    screen = Screen()
    screen.feed("\x1b[1;31mred\x1b[0m plain")
    (line,) = screen.lines()
    assert [(line.plain[span.start : span.end], str(span.style)) for span in line.spans] == [("red", "bold color(1)")]


def test_a_command_is_recorded_and_drawn(tmp_path: Path) -> None:
    code = "import os, sys; print(os.get_terminal_size().columns, sys.stdout.isatty())\n"
    code += "print('<&\x1b[32mok\x1b[0m'); sys.exit(3)"
    cast = tmp_path / "demo.cast"
    assert record(cast, [sys.executable, "-c", code]) == 3
    header, *events = [json.loads(line) for line in cast.read_text().splitlines()]
    assert (header["version"], header["width"]) == (2, 100)
    assert all(kind == "o" for _, kind, _ in events)
    frames = [lines for _, lines in frames_of(cast)]
    assert [line.plain for line in frames[-1]][:2] == ["100 True", "<&ok"]
    root = ElementTree.fromstring(draw("demo", frames, 2.0))
    assert root.tag == f"{SVG}svg"
    groups = root.findall(f"{SVG}g")
    assert [group.get("visibility") for group in groups] == ["hidden"] * (len(frames) - 1) + [None]
    assert "<&ok" in "".join(groups[-1].itertext())


def test_a_clock_alone_makes_no_frame(tmp_path: Path) -> None:
    cast = tmp_path / "clock.cast"
    shown = ["\rstep 1/5 0:00:01 eta ?, 3s", "\rstep 1/5 0:00:02 eta 4, 4s", "\rstep 2/5 0:00:03 eta 3, 5s"]
    events = [json.dumps([float(n), "o", text]) for n, text in enumerate(shown)]
    cast.write_text("\n".join(["{}", *events]) + "\n")
    assert [at for at, _ in frames_of(cast)] == [0.0, 2.0]


def test_frames_are_evenly_spaced_and_end_with_the_last() -> None:
    states = [(float(n), [*Screen().lines()]) for n in range(100)]
    assert len(chosen(states, MAX_FRAMES)) == MAX_FRAMES
    assert chosen(states, MAX_FRAMES)[-1] is states[-1][1]
    assert len(chosen(states[:3], MAX_FRAMES)) == 3
