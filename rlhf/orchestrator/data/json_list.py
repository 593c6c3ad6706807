"""Rows of a JSON list, one after the other: no more of the file is held than a row may be long."""

import codecs
import io
import json
import re
from collections.abc import Iterator

from rlhf.errors import DataError
from rlhf.orchestrator.data.files import READ_BYTES, Row, Source, too_long
from rlhf.orchestrator.data.problems import Problems
from rlhf.orchestrator.data.values import LENIENT_DECODER, explain, parse_json_at
from rlhf.types import Json

SPACES = re.compile(r"[ \t\r\n]*")
NEAR_END = 16
"""An error this close to the end of what was read may vanish when more is read."""


def object_of(value: Json) -> dict[str, Json]:
    """A row must be an object."""
    if not isinstance(value, dict):
        raise ValueError(f"not an object (got {type(value).__name__})")
    return value


def read_list(stream: io.BufferedReader, source: Source, problems: Problems) -> Iterator[Row]:
    """The objects of a JSON list; a row's place is its number in it (`train.json[0]`). What is no JSON raises DataError
    with its line."""
    window = Window(stream, source)
    window.take("[")
    index = 0
    while not window.take("]"):
        if index:
            window.require(",")
        where = f"{source.label}[{index}]"
        try:
            yield Row(file=source.label, where=where, values=object_of(window.value(where)))
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            problems.add_row(source.label, where, explain(error))
        index += 1
    window.require_end()


class Window:
    """A stretch of a text, from `position` on not yet used. It grows by reading, and forgets what is behind."""

    def __init__(self, stream: io.BufferedReader, source: Source) -> None:
        self._stream = stream
        self._source = source
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._position = 0
        self._line = 1
        self._column = 1
        self._at_end = False

    def take(self, character: str) -> bool:
        """Whether the next character after spaces is this one; if so, it is used."""
        found = self._next() == character
        self._position += found
        return found

    def require(self, character: str) -> None:
        """Use the next character, or raise DataError where it is another one."""
        if not self.take(character):
            raise self._error(json.JSONDecodeError(f"Expecting '{character}' delimiter", self._text, self._position))

    def require_end(self) -> None:
        """Raise DataError where there is more."""
        if self._next():
            raise self._error(json.JSONDecodeError("Extra data", self._text, self._position))

    def value(self, where: str) -> Json:
        """The next value, which is used. Raises DataError where it is no JSON or too long, ValueError where something
        in it would be lost."""
        if self._next() == "]":
            raise self._error(json.JSONDecodeError("trailing comma", self._text, self._position))
        limit = self._source.max_row_bytes
        while True:
            try:
                value, end = parse_json_at(self._text, self._position)
                if end < len(self._text) or self._at_end:
                    break
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - NEAR_END
                if self._at_end or not cut:
                    raise self._error(error) from error
            except ValueError as error:
                if self._skip():
                    raise
                if self._at_end:
                    raise DataError(f"{where}: {error}.") from error
            if len(self._text) - self._position > limit:
                raise DataError(f"{where}: {too_long(limit)}.")
            self._grow()
        size, self._position = end - self._position, end
        if size > limit:
            raise ValueError(too_long(limit))
        return value

    def _skip(self) -> bool:
        """Whether the next value, in which something would be lost, ends in what was read; if so, it is used."""
        try:
            _, end = LENIENT_DECODER.raw_decode(self._text, self._position)
        except (ValueError, RecursionError):
            return False
        self._position = end
        return True

    def _next(self) -> str:
        """The next character that is no space, not used yet; empty at the end."""
        while True:
            spaces = SPACES.match(self._text, self._position)
            assert spaces is not None, "it matches nothing, too"
            self._position = spaces.end()
            if self._position < len(self._text) or self._at_end:
                return self._text[self._position : self._position + 1]
            self._grow()

    def _grow(self) -> None:
        """Read as much again as there is, and forget what was used."""
        used, rest = self._text[: self._position], self._text[self._position :]
        self._line += used.count("\n")
        self._column = len(used) - used.rfind("\n") if "\n" in used else self._column + len(used)
        self._text, self._position = rest, 0
        chunk = self._stream.read(max(READ_BYTES, len(rest)))
        try:
            self._text += self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n") + error.object.count(b"\n", 0, error.start)
            raise DataError(f"{self._source.label}:{line}: not UTF-8.") from error
        self._at_end = not chunk

    def _error(self, error: json.JSONDecodeError) -> DataError:
        """What is wrong, with its line and column in the file."""
        line = self._line + error.doc.count("\n", 0, error.pos)
        if "\n" not in error.doc[: error.pos]:
            error.colno += self._column - 1
        return DataError(f"{self._source.label}:{line}: {explain(error)}")
