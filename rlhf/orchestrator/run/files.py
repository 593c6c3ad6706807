"""Writing files so that no reader ever sees half a file, not even after a crash."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from rlhf.errors import CheckpointError
from rlhf.types import Json


@contextmanager
def checkpoint_errors(path: Path) -> Iterator[None]:
    """Turn an OSError inside into a CheckpointError that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` at once: temporary file beside it, fsync, rename, fsync of the folder."""
    _write_pieces(path, [text])


def _write_pieces(path: Path, pieces: Iterable[str]) -> None:
    """`write_text` of a text that need not be in memory as a whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with checkpoint_errors(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_path(path.parent)


def overwrite_text(path: Path, text: str) -> None:
    """Write `text` over the content of an existing file, in its own blocks: needs no room if it has few bytes. A reader
    may see half of it."""
    with checkpoint_errors(path), path.open("r+b") as file:
        file.write(text.encode())
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` at once, also where other processes write the same file."""
    with checkpoint_errors(path):
        temporary = None
        try:
            with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
                temporary = Path(file.name)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_path(path.parent)
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Json]) -> None:
    """Replace `path` by `value` as JSON, at once."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def write_rows(path: Path, rows: Iterable[Mapping[str, Json]]) -> None:
    """Replace `path` by `rows` as .jsonl, at once. Makes its folder. Takes one row after the other."""
    with checkpoint_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    _write_pieces(path, (json.dumps(row) + "\n" for row in rows))


def append_json(path: Path, value: Mapping[str, Json]) -> None:
    """Add `value` to a .jsonl file as one line."""
    with checkpoint_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def read_rows(path: Path) -> list[dict[str, Json]]:
    """The objects of a .jsonl file, without lines that a crash tore; none where there is no such file."""
    if not path.is_file():
        return []
    rows = (_row_of(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [row for row in rows if row is not None]


def keep_lines(path: Path, last_step: int) -> None:
    """Drop the lines of a .jsonl file that lie past `last_step`, or that a crash tore."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        step = _step_of(line)
        if step is not None and step <= last_step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


def _row_of(line: str) -> dict[str, Json] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _step_of(line: str) -> int | None:
    step = (_row_of(line) or {}).get("step")
    return step if isinstance(step, int) else None


def sync_path(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync_path` of a folder and of everything in it, so that it may be renamed into place."""
    for path in folder.rglob("*"):
        sync_path(path)
    sync_path(folder)
