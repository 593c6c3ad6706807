"""Rows from wherever `data.path` points: files, a `datasets` folder, or a data set on the hub."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from rlhf.errors import DataError
from rlhf.orchestrator.data.files import READERS, Row, find_files, plain_row, read_file
from rlhf.orchestrator.data.problems import Problems

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read_rows(path: str, split: str, problems: Problems) -> list[Row]:
    """All good rows of a file, glob, `datasets` folder or hub name. What is wrong goes to `problems`."""
    try:
        folder = Path(path).expanduser()
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return _read_folder(folder, split, problems)
        looks_like_a_file = folder.exists() or folder.suffix in (*READERS, ".gz") or HUB_NAME.fullmatch(path) is None
        if not looks_like_a_file:
            return _read_hub(path, split, problems)
        files = find_files(path)
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


def _read_folder(folder: Path, split: str, problems: Problems) -> list[Row]:
    # Imported where it is used because it takes seconds.
    import datasets  # noqa: PLC0415

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"data: {folder} is a damaged datasets folder ({_first_line(error)}).") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f'data.split: {folder} has no split "{split}" (have {", ".join(loaded)}).')
        loaded = loaded[split]
    return _number(folder.name, loaded, problems)


def _read_hub(name: str, split: str, problems: Problems) -> list[Row]:
    import datasets  # noqa: PLC0415

    try:
        loaded = datasets.load_dataset(name, split=split)
    except ValueError as error:
        raise DataError(f"data: {name}: {_first_line(error)}.") from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        reason = _first_line(error)
        raise DataError(f"data: {name} matches no file, and no such data set can be loaded ({reason}).") from error
    return _number(name, loaded, problems)


def _number(label: str, loaded: Iterable[Mapping[str, object]], problems: Problems) -> list[Row]:
    rows = [
        Row(file=label, where=f"{label}:{number}", values=plain_row(values)) for number, values in enumerate(loaded, 1)
    ]
    if not rows:
        problems.add(f"data: {label} has no rows.")
    return rows


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
