"""Files of rows: where a row came from, and the bytes of a file, decompressed and bounded."""

import gzip
import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rlhf.config.data import MAX_ROW_BYTES
from rlhf.errors import DataError
from rlhf.orchestrator.data.progress import Progress
from rlhf.types import Json

MAX_EXPANDED_BYTES = 20 * 2**30
READ_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row: its columns, the file it came from and its place there (`train.jsonl:17`)."""

    file: str
    where: str
    values: Mapping[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A file to read. `label` is its short name in messages and ids; `max_bytes` bounds what it may expand to, and
    `max_row_bytes` what one row of it may hold."""

    path: Path
    label: str
    max_bytes: int = MAX_EXPANDED_BYTES
    max_row_bytes: int = MAX_ROW_BYTES

    @property
    def kind(self) -> str:
        """The suffix that says how the content is read, e.g. `.jsonl`."""
        return kind_of(self.path)


def kind_of(path: Path) -> str:
    """The suffix of a file that says how its content is read, e.g. `.jsonl` of rows.jsonl.gz."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def too_long(max_row_bytes: int) -> str:
    """What to say of a row that is longer than data.max_row_bytes."""
    return f"row longer than {max_row_bytes} bytes; raise data.max_row_bytes if it is meant"


class BoundedStream(io.RawIOBase):
    """The bytes of a file, decompressed where its name ends in .gz, with a bound and errors that name the place. Says
    how far a long file is read."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self._source = source
        self._file = source.path.open("rb")
        self._stream: IO[bytes] = (
            gzip.GzipFile(fileobj=self._file) if source.path.suffix == ".gz" else self._file  # type: ignore[assignment]
        )
        self._count = 0
        self._progress = Progress(f"reading {source.label}", source.path.stat().st_size, "bytes")

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
        self._progress.reach(self._file.tell())
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
