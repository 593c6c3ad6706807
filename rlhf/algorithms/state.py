"""Reading back, from a checkpoint's JSON, what an algorithm remembers between steps."""

from collections.abc import Mapping

from rlhf.errors import CheckpointError
from rlhf.types import Json


def number(state: Mapping[str, Json], name: str) -> float:
    """The number called `name`. Raises CheckpointError where there is none."""
    value = state.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"algorithm state: {name}: not a number (got {value!r}).")
    return float(value)
