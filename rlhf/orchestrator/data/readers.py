"""Rows of files: JSON lines, JSON, CSV and Parquet, each row with the place it came from, and none longer than
data.max_row_bytes."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping

from rlhf.config.json_file import is_lfs_pointer, lfs_advice
from rlhf.errors import DataError
from rlhf.orchestrator.data.files import READ_BYTES, Row, Source, open_bytes, too_long
from rlhf.orchestrator.data.json_list import object_of, read_list
from rlhf.orchestrator.data.problems import Problems
from rlhf.orchestrator.data.shape import require_lines, require_rows
from rlhf.orchestrator.data.tables import read_parquet
from rlhf.orchestrator.data.values import UTF_16_MARKS, explain, parse_json

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_file(source: Source, problems: Problems) -> Iterator[Row]:
    """The good rows of a file. Bad lines go to `problems`; a file that cannot be read raises DataError."""
    count = 0
    num_bad = problems.num_bad_rows
    try:
        if is_lfs_pointer(source.path):
            raise DataError(f"{source.label}: {lfs_advice(source.path)}.")
        for row in READERS[source.kind](source, problems):
            count += 1
            yield row
    except OSError as error:
        raise DataError(f"{source.label}: cannot be read ({error.strerror or error}).") from error
    if count == 0 and problems.num_bad_rows == num_bad:
        problems.add(f"data: {source.label} has no rows.")


def read_lines(source: Source, problems: Problems) -> Iterator[Row]:
    """JSON lines. A byte order mark, CRLF line ends and blank lines are fine."""
    limit = source.max_row_bytes
    with open_bytes(source) as stream:
        number = num_seen = 0
        while line := stream.readline(limit + len(b"\r\n") + 1):
            number += 1
            where = f"{source.label}:{number}"
            line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            try:
                if len(line.rstrip(b"\r\n")) > limit:
                    _skip_line(stream, line)
                    raise ValueError(too_long(limit))
                text = line.decode().rstrip()
                if not text:
                    continue
                num_seen += 1
                values = object_of(parse_json(text))
                if num_seen == 1:
                    require_rows(values, where, is_last=not stream.peek(1))
                yield Row(file=source.label, where=where, values=values)
            except ValueError as error:
                if isinstance(error, DataError):
                    raise
                if number == 1 and line[:2] in UTF_16_MARKS:
                    raise DataError(f"{where}: {explain(error)}") from error
                if num_seen == 1 and isinstance(error, json.JSONDecodeError):
                    require_lines(error, where, stream.peek(READ_BYTES))
                problems.add_row(source.label, where, explain(error))


def _skip_line(stream: io.BufferedReader, line: bytes) -> None:
    """Read to the end of the line that begins with `line`, without keeping it."""
    while line and not line.endswith(b"\n"):
        line = stream.readline(READ_BYTES)


def read_json(source: Source, problems: Problems) -> Iterator[Row]:
    """A JSON list of objects, whose places are their numbers in it (`train.json[0]`); a file of JSON lines under the
    name .json is read as such."""
    with open_bytes(source) as stream:
        start = stream.peek(READ_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
        if start == b"[":
            yield from read_list(stream, source, problems)
    if start != b"[":
        yield from read_lines(source, problems)


class CsvLines:
    """The lines of a CSV file as text. Raises DataError where a row is too long or a line is not UTF-8."""

    def __init__(self, stream: io.BufferedReader, source: Source) -> None:
        self.size = 0
        """Bytes since the last row; the reader of rows resets it."""
        self._stream = stream
        self._source = source
        self._number = 0

    def __iter__(self) -> Iterator[str]:
        limit, label, start = self._source.max_row_bytes, self._source.label, 1
        while line := self._stream.readline(limit + len(b"\r\n") + 1):
            self._number += 1
            start = self._number if self.size == 0 else start
            self.size += len(line)
            if self.size > limit and self.size - len(line) + len(line.rstrip(b"\r\n")) > limit:
                raise DataError(f"{label}:{start}: {too_long(limit)}.")
            try:
                text = (line.removeprefix(BYTE_ORDER_MARK) if self._number == 1 else line).decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{label}:{self._number}: {explain(error)}") from error
            if "\r" in text:  # alone, it ends a line as well, as in files of old tools
                yield from io.StringIO(text, newline="")
            else:
                yield text


def read_csv(source: Source, problems: Problems) -> Iterator[Row]:
    """CSV with a header. Every value is text. A row's place is the line on which it starts."""
    csv.field_size_limit(source.max_row_bytes)
    header: list[str] = []
    before = 0
    with open_bytes(source) as stream:
        lines = CsvLines(stream, source)
        reader = csv.reader(lines, strict=True)
        try:
            for cells in reader:
                where, before, lines.size = f"{source.label}:{before + 1}", reader.line_num, 0
                if not cells:
                    continue
                if not header:
                    header = cells
                    refuse_repeated(header, where)
                    refuse_other_separators(header, where)
                elif len(cells) != len(header):
                    problems.add_row(source.label, where, f"{len(cells)} fields, the header has {len(header)}.")
                else:
                    yield Row(file=source.label, where=where, values=dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            raise DataError(f"{source.label}:{reader.line_num}: not valid CSV: {error}.") from error


def refuse_repeated(names: list[str], where: str) -> None:
    """Raise DataError naming every column that is there twice: only one of them could be read."""
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:
        raise DataError(
            [f"{where}: column {json.dumps(name, ensure_ascii=False)} is there twice." for name in repeated]
        )


def refuse_other_separators(names: list[str], where: str) -> None:
    """Raise DataError where all columns would be read as one."""
    for separator, name in ((";", ";"), ("\t", "tabs"), ("|", "|")):
        if len(names) == 1 and separator in names[0]:
            raise DataError(f"{where}: columns are divided by {name}; need commas. Save the file with commas.")


READERS: Mapping[str, Callable[[Source, Problems], Iterator[Row]]] = {
    ".jsonl": read_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
