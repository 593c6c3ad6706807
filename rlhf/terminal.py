"""Everything that this process shows on a terminal is written here, with control characters escaped: text of a model, a
row, a reward service or a library must not move the cursor, recolor the terminal or look like a message of the run."""

import contextlib
import logging
import os
import select
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

LAYOUT = "\n\t"
"""The control characters that lay out a text of several lines."""


def visible(text: str) -> str:
    """`text` on one line, with every control, direction-changing or broken character escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def counted(number: int, noun: str) -> str:
    """`1 row`, `2 rows`, `2 processes`."""
    return f"{number} {noun if number == 1 else noun + ('es' if noun.endswith('s') else 's')}"


def escaped(text: str) -> str:
    """`text` with such characters escaped, except line breaks and tabs."""
    if text.isprintable():
        return text
    return "".join(c if c in LAYOUT else visible(c) for c in text)


def write(text: str, stream: TextIO | None = None) -> None:
    """Write `text` to `stream` (stdout by default), escaped."""
    stream = sys.stdout if stream is None else stream
    stream.write(escaped(text))
    stream.flush()


def write_line(text: str, stream: TextIO | None = None) -> None:
    """Write `text` as one line to `stream` (stdout by default), escaped."""
    write(visible(text) + "\n", stream)


def tell(lines: Iterable[str]) -> None:
    """Write each of `lines` as one line to stderr, escaped. A reader that is gone is no error."""
    with contextlib.suppress(BrokenPipeError):
        write("".join(f"{visible(line)}\n" for line in lines), sys.stderr)


def show_traceback(error: BaseException) -> None:
    """Write the traceback of `error` to stderr, escaped."""
    with contextlib.suppress(BrokenPipeError):
        write("".join(traceback.format_exception(error)), sys.stderr)


def is_terminal(stream: TextIO | None = None) -> bool:
    """Whether `stream` (stdout by default) is a terminal."""
    return (sys.stdout if stream is None else stream).isatty()


@contextlib.contextmanager
def library_output_to(file: Path) -> Iterator[TextIO]:
    """Inside, what libraries and child processes write to stdout and stderr is appended to `file`. Gives a stream to
    the terminal, for what the command itself shows. On an error inside, a line names the file."""
    try:
        own = [sys.stdout.fileno(), sys.stderr.fileno()]
    except (OSError, ValueError):  # they are not files: a notebook, a test
        yield sys.stdout
        return
    before = [os.dup(descriptor) for descriptor in own]
    with (
        contextlib.ExitStack() as stack,
        file.open("ab") as log,
        os.fdopen(os.dup(before[0]), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors) as stream,
    ):
        for descriptor in before:
            stack.callback(os.close, descriptor)
        stack.callback(_give_back, own, before)
        for descriptor in own:
            os.dup2(log.fileno(), descriptor)
        try:
            yield stream
        except BaseException:
            _give_back(own, before)
            tell([f"rlhf: what the libraries wrote is in {file}"])
            raise


def _give_back(own: Sequence[int], before: Sequence[int]) -> None:
    """Have stdout and stderr where they were."""
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor, kept in zip(own, before, strict=True):
        os.dup2(kept, descriptor)


def stdout_is_closed() -> bool:
    """Whether the reader of stdout is gone. Then nothing more is written to it, not even at exit."""
    # Asked, because another flush may succeed: a write that failed drops what it could not write.
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def rich_console(stream: TextIO | None = None, *, soft_wrap: bool = False) -> "Console":
    """A rich console on `stream` (stdout by default) that escapes all text and keeps rich's own styles."""
    from rich.console import Console, ConsoleOptions, RenderableType  # noqa: PLC0415  not for commands that print text
    from rich.segment import Segment  # noqa: PLC0415

    class EscapingConsole(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            """Every segment of `renderable`; the cursor moves of rich itself are control segments."""
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(escaped(segment.text), segment.style)

        def on_broken_pipe(self) -> None:
            """As every writer here: rich would end the process with code 1."""
            raise BrokenPipeError

    return EscapingConsole(file=stream, soft_wrap=soft_wrap, highlight=False)


class EscapedFormatter(logging.Formatter):
    """Formats a log record as escaped text."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


def show_logs() -> None:
    """Have log records of this process shown on stderr: those of rlhf from INFO up, others from WARNING up."""
    handler = logging.StreamHandler()
    handler.setFormatter(EscapedFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("rlhf").setLevel(logging.INFO)


def escape_unconfigured_logs() -> None:
    """Have warnings that are logged while no handler is set shown as escaped lines on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(EscapedFormatter("%(message)s"))
    handler.setLevel(logging.WARNING)
    logging.lastResort = handler
