"""Rows from files: JSON lines, JSON, CSV and Parquet, plain or gzipped, each with the place it came from."""

import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

from rlhf.errors import DataError
from rlhf.orchestrator.data.problems import Problems
from rlhf.types import Json

MAX_EXPANDED_BYTES = 20 * 2**30
MAX_LINE_BYTES = 64 * 2**20
READ_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: its columns, the file it came from and its place there (`train.jsonl:17`)."""

    file: str
    where: str
    values: Mapping[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file to read. `label` is its short name in messages and ids; `max_bytes` bounds what it may expand to."""

    path: Path
    label: str
    max_bytes: int = MAX_EXPANDED_BYTES

    @property
    def kind(self) -> str:
        """The suffix that says how the content is read, e.g. `.jsonl`."""
        return Path(self.path.name.removesuffix(".gz")).suffix.lower()


def find_files(pattern: str) -> list[Source]:
    """The files that a path or glob names, in sorted order; a folder means the data files inside it.

    Raises DataError where none matches.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if Source(path=file, label="").kind in READERS)
    elif path.is_file():
        found = [path]
    else:
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207 the pattern may be absolute
        found = sorted(Path(name) for name in names if Path(name).is_file())
    if not found:
        raise DataError(f"data: {pattern} matches no file.")
    unknown = [file for file in found if Source(path=file, label="").kind not in READERS]
    if unknown:
        known = ", ".join(READERS)
        raise DataError([f"{file}: unknown kind of file (have {known}, each also with .gz)." for file in unknown])
    unique = len({file.name for file in found}) == len(found)
    return [Source(path=file, label=file.name if unique else str(file)) for file in found]


def read_file(source: Source, problems: Problems) -> Iterator[Row]:
    """The good rows of a file. Bad lines go to `problems`; a file that cannot be read raises DataError."""
    count = 0
    num_bad = problems.num_bad_rows
    try:
        for row in READERS[source.kind](source, problems):
            count += 1
            yield row
    except OSError as error:
        raise DataError(f"{source.label}: cannot be read ({error.strerror or error}).") from error
    if count == 0 and problems.num_bad_rows == num_bad:
        problems.add(f"data: {source.label} has no rows.")


class BoundedStream(io.RawIOBase):
    """The bytes of a file, decompressed where its name ends in .gz, with a bound and errors that name the place."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._file = source.path.open("rb")
        self._stream: IO[bytes] = (
            gzip.GzipFile(fileobj=self._file) if source.path.suffix == ".gz" else self._file  # type: ignore[assignment]
        )
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        label, limit = self._source.label, self._source.max_bytes
        try:
            chunk = self._stream.read(len(buffer))
        except EOFError as error:
            raise DataError(f"{label}: ends early at byte {self._file.tell()}.") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{label}: damaged gzip file ({error}).") from error
        self._count += len(chunk)
        if self._count > limit:
            size = f"{limit / 2**30:g} GiB" if limit >= 2**30 else f"{limit} bytes"
            raise DataError(f"{label}: expands past {size}.")
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        self._stream.close()
        self._file.close()
        super().close()


def open_bytes(source: Source) -> io.BufferedReader:
    """A file's bytes, decompressed and bounded."""
    return io.BufferedReader(BoundedStream(source), READ_BYTES)


def read_bytes(source: Source) -> bytes:
    """The whole of a file, decompressed and bounded."""
    with open_bytes(source) as stream:
        return stream.read()


def read_lines(source: Source, problems: Problems) -> Iterator[Row]:
    """JSON lines. A byte order mark, CRLF line ends and blank lines are fine."""
    with open_bytes(source) as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{source.label}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{where}: line longer than {MAX_LINE_BYTES // 2**20} MiB.")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                text = line.decode().rstrip()
                if text:
                    yield Row(file=source.label, where=where, values=mapping(parse_json(text)))
            except ValueError as error:
                problems.add_row(source.label, where, explain(error))


def read_json(source: Source, problems: Problems) -> Iterator[Row]:
    """A JSON list of objects, whose places are their numbers in it (`train.json[0]`); a file of JSON lines under the
    name .json is read as such."""
    with open_bytes(source) as stream:
        start = stream.peek(READ_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start != b"[":
        yield from read_lines(source, problems)
        return
    text = read_text(source)
    try:
        values = parse_json(text)
    except ValueError as error:
        line = text.count("\n", 0, error.pos) + 1 if isinstance(error, json.JSONDecodeError) else 1
        raise DataError(f"{source.label}:{line}: {explain(error)}") from error
    for index, value in enumerate(values if isinstance(values, list) else []):
        where = f"{source.label}[{index}]"
        try:
            yield Row(file=source.label, where=where, values=mapping(value))
        except ValueError as error:
            problems.add_row(source.label, where, explain(error))


def read_csv(source: Source, problems: Problems) -> Iterator[Row]:
    """CSV with a header. A row's place is the line on which it starts."""
    text = read_text(source)
    csv.field_size_limit(MAX_LINE_BYTES)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    before = 0
    try:
        for cells in reader:
            where, before = f"{source.label}:{before + 1}", reader.line_num
            if not cells:
                continue
            if not header:
                header = cells
            elif len(cells) != len(header):
                problems.add_row(source.label, where, f"{len(cells)} fields, the header has {len(header)}.")
            else:
                yield Row(file=source.label, where=where, values=dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{source.label}:{reader.line_num}: not valid CSV: {error}.") from error


def read_parquet(source: Source, problems: Problems) -> Iterator[Row]:
    """Parquet. A row's place is its number, from 1."""
    # Imported here because it takes half a second, and only Parquet needs it.
    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet  # noqa: PLC0415

    number = 0
    try:
        content = source.path if source.path.suffix != ".gz" else io.BytesIO(read_bytes(source))
        with pyarrow.parquet.ParquetFile(content) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(file=source.label, where=f"{source.label}:{number}", values=plain_row(values))
    except (pyarrow.ArrowException, OSError) as error:
        no_footer = any(sign in str(error) for sign in ("footer", "file size is"))
        reason = "no footer" if no_footer else str(error).splitlines()[0]
        raise DataError(f"{source.label}: damaged file ({reason}).") from error


READERS: dict[str, Callable[[Source, Problems], Iterator[Row]]] = {
    ".jsonl": read_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def read_text(source: Source) -> str:
    """A whole file as text, without a byte order mark."""
    content = read_bytes(source)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        start = error.start - (content.rfind(b"\n", 0, error.start) + 1)
        raise DataError(f"{source.label}:{line}: not UTF-8 at byte {start}.") from error


def parse_json(text: str) -> Json:
    """One JSON value. Raises ValueError, for NaN and Infinity too, which JSON does not have."""
    try:
        value: Json = json.loads(text, parse_constant=refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    return value


def mapping(value: Json) -> dict[str, Json]:
    """A row must be an object."""
    if not isinstance(value, dict):
        raise ValueError(f"not an object (got {type(value).__name__})")
    return value


def plain_row(values: Mapping[str, object]) -> dict[str, Json]:
    """A row of a table as JSON values: dates and the like become text, bytes a replacement."""
    plain: dict[str, Json] = json.loads(json.dumps(values, default=str))
    return plain


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"not valid JSON: {name}")


def explain(error: ValueError) -> str:
    """What is wrong with a line, in one sentence."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}."
    if isinstance(error, json.JSONDecodeError):
        before, at = error.doc[: error.pos].rstrip(), error.doc[error.pos : error.pos + 1]
        trailing = before.endswith(",") and at in ("}", "]")
        return "not valid JSON: trailing comma." if trailing else f"not valid JSON: {error.msg} (column {error.colno})."
    return f"{error}."
