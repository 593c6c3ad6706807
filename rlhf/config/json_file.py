"""Reads a model's JSON files, and the error of all checks of a model's files."""

import json
from pathlib import Path


class ModelFileError(ValueError):
    """A model's file cannot be used. The message says which and why."""


LFS_START = b"version https://git-lfs.github.com/spec/"


def is_lfs_pointer(file: Path) -> bool:
    """Whether Git LFS has left a pointer in place of this file. Raises OSError."""
    with file.open("rb") as stream:
        return stream.read(len(LFS_START)) == LFS_START


def lfs_advice(file: Path) -> str:
    """What to do about a pointer in place of a file, without the file's name."""
    return f"a pointer of Git LFS in place of the file; run `git lfs pull` in {file.parent}"


def read_json(file: Path) -> dict[str, object]:
    """The object in a JSON file. Raises ModelFileError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{file.parent} has no {file.name}.") from None
    except OSError as error:
        raise ModelFileError(f"{file} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        if is_lfs_pointer(file):
            raise ModelFileError(f"{file}: {lfs_advice(file)}.") from None
        raise ModelFileError(f"{file} is not JSON.") from None
    if not isinstance(content, dict):
        raise ModelFileError(f"{file} is not a JSON object.")
    return content
