"""What a JSON file looks like that holds no rows as lines: one message about its shape, not one for each line."""

import json
import re
from collections.abc import Mapping

from rlhf.errors import DataError
from rlhf.orchestrator.data.columns import PROMPT
from rlhf.types import Json

ONE_A_LINE = "Write one object a line (.jsonl), or a list of objects (.json)"
WRAPPER = re.compile(r'\{\s*"(?P<key>[^"\\]+)"\s*:\s*\[\s*\{')


def require_rows(values: Mapping[str, Json], where: str, *, is_last: bool) -> None:
    """Raise DataError where a file's only object holds the rows under one of its keys, as in {"data": [...]}."""
    if not is_last or any(name in values for name in (*PROMPT, "chosen", "text")):
        return
    for key, value in values.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            raise DataError(f"{where}: {_wrapped(key)}")


def require_lines(error: json.JSONDecodeError, where: str, after: bytes) -> None:
    """Raise DataError where the first line is the beginning of a longer text: an object or a list over several lines.

    `error` is what is wrong with the line alone, `after` the beginning of what follows it.
    """
    rest = after.lstrip()
    if error.pos < len(error.doc.rstrip()) or not rest or (error.doc[:1] == "{" and rest[:1] == b"{"):
        return
    if error.doc[:1] == "[":
        raise DataError(f"{where}: looks like a JSON list over several lines. {ONE_A_LINE}.")
    if wrapper := WRAPPER.match(error.doc + after.decode(errors="replace")):
        raise DataError(f"{where}: {_wrapped(wrapper['key'])}")
    if error.doc[:1] == "{":
        raise DataError(f"{where}: looks like an object over several lines. {ONE_A_LINE}.")


def _wrapped(key: str) -> str:
    return f"looks like one object that holds the rows under {json.dumps(key)}. {ONE_A_LINE}: that list alone."
