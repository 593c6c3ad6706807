"""Records a command's terminal and draws it as an animated SVG, without a program besides Python and rich.

    python scripts/record.py run OUT.cast -- rlhf train grpo configs/grpo_stories_cpu.yaml
    python scripts/record.py draw OUT.cast OUT.svg [--text OUT.txt] [--seconds 12]

`run` gives the command a terminal of 100 columns and 30 lines and writes what it prints, with times, in the format of
asciinema (version 2). `draw` plays that into a screen and writes some of its states, evenly spaced, as the frames of an
SVG that any browser animates, and the last state of the screen as text.
"""

import argparse
import json
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from fcntl import ioctl
from html import escape
from itertools import pairwise
from pathlib import Path

from rich.color import Color
from rich.style import Style
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS, LINES = 100, 30
CELL_W, CELL_H, MARGIN = 8.4, 18, 12
SEQUENCE = re.compile(r"\x1b\[(?P<arguments>[0-9;?]*)(?P<what>[A-Za-z])|\x1b\][^\x07]*\x07|\x1b[()][A-Z0-9]")
MAX_FRAMES = 30
CLOCK = re.compile(r"\b[0-9]+(:[0-9]{2}){1,2}\b|\b[0-9]+ ?s\b|eta \S+")
"""What changes on a screen while nothing happens."""


def record(out: Path, command: Sequence[str]) -> int:
    """Run a command in a terminal of its own. Returns its exit code."""
    start = time.monotonic()
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS=str(COLUMNS), LINES=str(LINES), COLORTERM="truecolor")
        os.execvp(command[0], [*command])
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    with out.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"version": 2, "width": COLUMNS, "height": LINES, "command": " ".join(command)}) + "\n")
        for data in _output(terminal):
            file.write(json.dumps([round(time.monotonic() - start, 3), "o", data]) + "\n")
            file.flush()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _output(terminal: int) -> Iterator[str]:
    pending = b""
    while True:
        select.select([terminal], [], [])
        try:
            data = os.read(terminal, 65536)
        except OSError:  # the other side is closed
            return
        if not data:
            return
        pending += data
        text = pending.decode(errors="ignore")
        pending = pending[len(text.encode()) :]
        yield text


class Screen:
    """The cells of a terminal, as far as rich's output needs one."""

    def __init__(self) -> None:
        self._rows: list[list[tuple[str, str]]] = [[]]
        self._row = self._column = 0
        self._style = ""

    def feed(self, data: str) -> None:
        """Print `data`."""
        place = 0
        for found in SEQUENCE.finditer(data):
            self._print(data[place : found.start()])
            self._obey(found["arguments"] or "", found["what"] or "")
            place = found.end()
        self._print(data[place:])

    def lines(self) -> list[Text]:
        """What is on the screen."""
        return [self._line(row) for row in self._rows[-LINES:]]

    def _line(self, row: Sequence[tuple[str, str]]) -> Text:
        text, style = "", ""
        for character, its in row:
            if its != style:
                text += "\x1b[0m" + (f"\x1b[{its}m" if its else "")
                style = its
            text += character
        return Text.from_ansi(text)

    def _print(self, text: str) -> None:
        for character in text:
            if character == "\r":
                self._column = 0
            elif character == "\n":
                self._row += 1
                while len(self._rows) <= self._row:
                    self._rows.append([])
            elif character.isprintable():
                row = self._rows[self._row]
                row += [(" ", "")] * (self._column + 1 - len(row))
                row[self._column] = (character, self._style)
                self._column += 1

    def _obey(self, arguments: str, what: str) -> None:
        count = int(arguments) if arguments.isdigit() else 1
        if what == "A":
            self._row = max(self._row - count, 0)
        elif what == "B":
            self._row += count
        elif what == "K":
            del self._rows[self._row][0 if arguments == "2" else self._column :]
        elif what == "m":
            self._style = "" if arguments in ("", "0") else ";".join(filter(None, (self._style, arguments)))


def frames_of(cast: Path) -> list[tuple[float, list[Text]]]:
    """The states of the screen with their times, each different from the one before in more than its clocks."""
    screen, states, before = Screen(), list[tuple[float, list[Text]]](), ""
    for line in cast.read_text(encoding="utf-8").splitlines()[1:]:
        at, _, data = json.loads(line)
        screen.feed(data)
        lines = screen.lines()
        text = CLOCK.sub("", "\n".join(one.plain for one in lines))
        if text.strip() and text != before:
            states.append((at, lines))
        before = text
    return states


def chosen(states: Sequence[tuple[float, list[Text]]], count: int) -> list[list[Text]]:
    """At most `count` of the states, evenly spaced, the last one among them."""
    if len(states) <= count:
        return [lines for _, lines in states]
    places = {round(n * (len(states) - 1) / (count - 1)) for n in range(count)}
    return [states[place][1] for place in sorted(places)]


def draw(title: str, frames: Sequence[Sequence[Text]], seconds: float) -> str:
    """The frames as one animated SVG: each is visible for its share of the time, the last one three times as long."""
    height = max(len(lines) for lines in frames) * CELL_H + 2 * MARGIN + CELL_H
    width = COLUMNS * CELL_W + 2 * MARGIN
    share = 100 / (len(frames) + 2)
    rules, groups = [], []
    for n, lines in enumerate(frames):
        first, end = n * share, 100 if n == len(frames) - 1 else (n + 1) * share
        stops = [f"{first:.2f}%,{end:.2f}%{{visibility:visible}}"]
        stops += ["0%{visibility:hidden}"] if n else []
        stops += [f"{min(end + 0.01, 100):.2f}%,100%{{visibility:hidden}}"] if n < len(frames) - 1 else []
        rules.append(f"@keyframes f{n}{{{''.join(stops)}}}#f{n}{{animation:f{n} {seconds:g}s step-end infinite}}")
        rows = [_row(line, MARGIN + CELL_H * (number + 2)) for number, line in enumerate(lines) if line.plain.strip()]
        hidden = "" if n == len(frames) - 1 else ' visibility="hidden"'  # what does not animate shows the last frame
        groups.append(f'<g id="f{n}"{hidden}>{"".join(rows)}</g>')
    back, front = MONOKAI.background_color.hex, MONOKAI.foreground_color.hex
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">'
        f"<title>{escape(title)}</title><style>text{{font:14px monospace;white-space:pre;fill:{front}}}{''.join(rules)}"
        f'</style><rect width="100%" height="100%" rx="8" fill="{back}"/>'
        f'<text x="{MARGIN}" y="{MARGIN + 10}" opacity="0.6">$ {escape(title)}</text>{"".join(groups)}</svg>\n'
    )


def _row(line: Text, y: float) -> str:
    pieces, place = [], 0
    edges = sorted({0, len(line.plain), *(edge for span in line.spans for edge in (span.start, span.end))})
    for start, end in pairwise(edges):
        styles = [span.style for span in line.spans if span.start <= start and end <= span.end]
        style = Style.combine([Style.null(), *(one if isinstance(one, Style) else Style.parse(one) for one in styles)])
        text = escape(line.plain[start:end])
        look = _look(style)
        pieces.append(f"<tspan {look}>{text}</tspan>" if look and text.strip() else text)
        place = end
    assert place == len(line.plain), "all of the line is drawn"
    return f'<text x="{MARGIN}" y="{y:g}" textLength="{len(line.plain) * CELL_W:g}">{"".join(pieces)}</text>'


def _look(style: Style) -> str:
    color = style.color if isinstance(style.color, Color) else None
    looks = [f'fill="{color.get_truecolor(MONOKAI).hex}"'] if color and not color.is_default else []
    looks += ['font-weight="bold"'] if style.bold else []
    looks += ['opacity="0.6"'] if style.dim else []
    return " ".join(looks)


def main() -> int:
    parser = argparse.ArgumentParser(description="Records a command's terminal, and draws it as an animated SVG.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("out", type=Path)
    run.add_argument("command", nargs="+")
    drawn = verbs.add_parser("draw")
    drawn.add_argument("cast", type=Path)
    drawn.add_argument("svg", type=Path)
    drawn.add_argument("--text", type=Path)
    drawn.add_argument("--seconds", type=float, default=15.0)
    args = parser.parse_args()
    if args.verb == "run":
        return record(args.out, args.command)
    states = frames_of(args.cast)
    title = json.loads(args.cast.read_text(encoding="utf-8").splitlines()[0])["command"]
    args.svg.write_text(draw(title, chosen(states, MAX_FRAMES), args.seconds), encoding="utf-8")
    if args.text is not None:
        last = "\n".join(line.plain.rstrip() for line in states[-1][1])
        args.text.write_text(f"$ {title}\n{last.rstrip()}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
