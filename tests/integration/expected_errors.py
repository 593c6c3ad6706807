"""What an engine refuses to write or read, as text."""

from collections.abc import Callable
from pathlib import Path

from rlhf.errors import CheckpointError, NumericsError


def error_of(act: Callable[[Path], None], directory: Path) -> str:
    """What a save, an export or a load says where it is stopped; nothing where it is not."""
    try:
        act(directory)
    except (CheckpointError, NumericsError) as error:
        return str(error)
    return ""
