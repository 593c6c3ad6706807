"""Rows from wherever `data.path` points: files, a `datasets` folder, or a data set on the hub."""

import re
from collections.abc import Iterator
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.config.data import MAX_ROW_BYTES
from rlhf.errors import DataError
from rlhf.orchestrator.data.files import Row, Source
from rlhf.orchestrator.data.layout import ALL, TRAIN, Wanted, find_files
from rlhf.orchestrator.data.problems import Problems
from rlhf.orchestrator.data.readers import READERS, read_file
from rlhf.orchestrator.data.tables import CONVERSION_ERRORS, MAX_BATCH_ROWS, first_line, rows_of

if TYPE_CHECKING:
    import datasets
    import pyarrow

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SUBSETS = re.compile(r"(Config name is missing|BuilderConfig \S+ not found).*?\[(?P<names>[^]]*)\]", re.DOTALL)
"""What `datasets` says where it needs the name of a subset."""


class Place(Enum):
    """What a path points at."""

    FILES = auto()
    SAVED = auto()
    """A folder that `datasets` saved."""
    HUB = auto()


def place_of(path: str) -> Place:
    """What a path points at, whether or not it is there."""
    local = Path(path).expanduser()
    if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
        return Place.SAVED
    looks_like_a_file = local.exists() or local.suffix in (*READERS, ".gz") or HUB_NAME.fullmatch(path) is None
    return Place.FILES if looks_like_a_file else Place.HUB


def read_rows(path: str, wanted: Wanted, problems: Problems, max_row_bytes: int = MAX_ROW_BYTES) -> list[Row]:
    """All good rows of a file, glob, folder, `datasets` folder or hub name. What is wrong goes to `problems`."""
    try:
        match place_of(path):
            case Place.SAVED:
                return _read_saved(Path(path).expanduser(), wanted, problems, max_row_bytes)
            case Place.HUB:
                return _read_hub(path, wanted, problems, max_row_bytes)
            case Place.FILES:
                files = find_files(path, wanted, problems, max_row_bytes)
    except DataError as error:
        _note(error, problems)
        return []
    rows: list[Row] = []
    for file in files:
        try:
            rows += read_file(file, problems)
        except DataError as error:
            _note(error, problems)
    return rows


def _note(error: DataError, problems: Problems) -> None:
    for problem in error.problems:
        problems.add(problem)


def _read_saved(folder: Path, wanted: Wanted, problems: Problems, max_row_bytes: int) -> list[Row]:
    # Imported where it is used because it takes seconds.
    import datasets  # noqa: PLC0415

    if wanted.subset is not None:
        raise DataError(f"data.subset: {folder} was saved by `datasets` and has none. Remove it.")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever the library makes of a damaged folder
        raise DataError(f"data: {folder} is a damaged datasets folder ({first_line(error)}).") from error
    if isinstance(loaded, datasets.DatasetDict):
        split = wanted.choose(list(loaded), str(folder))
        if split == ALL:
            parts = [
                (Source(path=folder, label=f"{folder.name}/{name}", max_row_bytes=max_row_bytes), loaded[name])
                for name in loaded
            ]
            return [row for source, part in parts for row in _rows(source, part, problems)]
        if others := [name for name in loaded if name != split]:
            problems.note(f"of {folder}, the split {split} is read; not {', '.join(others)}.")
        loaded = loaded[split]
    else:  # like a file: the folder is what the user named, whatever split it was
        wanted.choose(list(dict.fromkeys([TRAIN, str(loaded.split or TRAIN)])), str(folder))
    return _rows(Source(path=folder, label=folder.name, max_row_bytes=max_row_bytes), loaded, problems)


def _read_hub(name: str, wanted: Wanted, problems: Problems, max_row_bytes: int) -> list[Row]:
    import datasets  # noqa: PLC0415

    failures: list[DataError] = []
    for split in wanted.names:
        try:
            loaded = datasets.load_dataset(name, wanted.subset, split=split)
        except ValueError as error:
            if (several := SUBSETS.search(str(error))) is not None:
                have = several["names"].replace("'", "")
                raise DataError(f"data.subset: {name} has {have}; choose one (got {wanted.subset}).") from error
            failures.append(DataError(f"data: {name}: {first_line(error)}."))
        except Exception as error:  # whatever the library makes of a name, a network and the files it finds
            reason = first_line(error)
            raise DataError(f"data: {name} matches no file, and no such data set can be loaded ({reason}).") from error
        else:
            return _rows(Source(path=Path(name), label=name, max_row_bytes=max_row_bytes), loaded, problems)
    raise failures[0]


def _rows(source: Source, loaded: "datasets.Dataset", problems: Problems) -> list[Row]:
    """The rows as Arrow holds them: nothing is decoded, so that images and the like need no further packages."""
    import pyarrow  # noqa: PLC0415

    try:
        rows = list(rows_of(_batches(loaded.with_format("arrow")), source, problems, max(len(loaded), 1)))
    except (pyarrow.ArrowException, OSError, *CONVERSION_ERRORS) as error:  # some damage shows only in the rows
        raise DataError(f"data: {source.path} is damaged ({first_line(error)}).") from error
    if not len(loaded):
        problems.add(f"data: {source.label} has no rows.")
    return rows


def _batches(loaded: "datasets.Dataset") -> "Iterator[pyarrow.RecordBatch]":
    for table in loaded.iter(batch_size=MAX_BATCH_ROWS):
        table.validate(full=True)  # Arrow trusts a file of its own, and reads outside of it where it is damaged
        yield from table.combine_chunks().to_batches()
