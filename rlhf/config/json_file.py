"""Reads a model's JSON files, and the error of all checks of a model's files."""

import json
from pathlib import Path


class ModelFileError(ValueError):
    """A model's file cannot be used. The message says which and why."""


def read_json(file: Path) -> dict[str, object]:
    """The object in a JSON file. Raises ModelFileError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{file.parent} has no {file.name}.") from None
    except OSError as error:
        raise ModelFileError(f"{file} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise ModelFileError(f"{file} is not JSON.") from None
    if not isinstance(content, dict):
        raise ModelFileError(f"{file} is not a JSON object.")
    return content
