"""Values of rows: one rule for each type, whatever the format. JSON text is parsed here, and what tables hold becomes
the same values."""

import json
import math
import re
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import NoReturn
from uuid import UUID

from rlhf.types import Json

MAX_DEPTH = 100
MAX_SHOWN = 60
MAX_DIGITS = 4300
"""Python converts no longer integers to and from text."""
TOO_DEEP = "nested too deep"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
JSON_SPACES = " \t\r\n"
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str) -> Json:
    """One JSON value. Raises ValueError, also for what JSON does not have (NaN, Infinity), for a key that an object has
    twice, and for numbers and texts that cannot be kept as they are."""
    start = len(text) - len(text.lstrip(JSON_SPACES))
    value, end = parse_json_at(text, start)
    if rest := text[end:].lstrip(JSON_SPACES):
        raise json.JSONDecodeError("Extra data", text, len(text) - len(rest))
    return value


def parse_json_at(text: str, start: int) -> tuple[Json, int]:
    """The JSON value that begins at `start`, and where it ends. Raises as `parse_json` does."""
    try:
        value, end = DECODER.raw_decode(text, start)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    except ValueError as error:
        if str(error).startswith("Exceeds the limit"):  # Python's own bound, in words about Python
            what = f"an integer of more than {MAX_DIGITS} digits, which cannot be read; write it as text"
            raise ValueError(what) from error
        raise
    return _checked(value, text[start:end]), end


def _checked(value: Json, text: str) -> Json:
    """A value that was parsed from `text`. Raises ValueError where it is nested too deep or holds half of a character,
    which only escapes can write."""
    escaped = SURROGATE_ESCAPE.search(text) is not None
    if escaped or text.count("[") + text.count("{") > MAX_DEPTH:
        plain(value, "")
    return value


def plain(value: object, path: str, depth: int = 0) -> Json:  # noqa: PLR0911, C901, PLR0912  one line for each type
    """A value of a table (Arrow's Python objects) or of JSON as a JSON value; `path` names it in messages.

    Bytes are UTF-8 text. Dates and times are ISO 8601 text, durations seconds. A decimal is an integer where it is
    whole, else a float; where a float cannot hold its digits it stays text. Keys of maps become text. Raises ValueError
    for everything else, and for NaN, infinities, bytes that are not text, and half a surrogate pair.
    """
    if depth > MAX_DEPTH:
        raise ValueError(TOO_DEEP)
    match value:
        case None | bool() | int():
            return value
        case str():
            return _text(value, path)
        case float():
            if not math.isfinite(value):
                raise ValueError(f"{_named(path)} is {value}, which is no value; write null or leave it out")
            return value
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{_named(path)} is not text (got bytes)") from error
        case list():
            return [plain(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
        case dict():
            return _object_of(value, path, depth)
        case datetime() | date() | time():
            return value.isoformat()
        case timedelta():
            return value.total_seconds()
        case Decimal():
            return _decimal(value, path)
        case UUID():
            return str(value)
        case _:
            raise ValueError(f"{_named(path)} holds a {type(value).__name__}, which cannot be read")


def canonical_text(value: Json) -> str | None:
    """A label or id as the text that an answer is compared with: 2.0 is `2`, a list of one is its element, other lists
    and objects are JSON. None where there is no value."""
    match value:
        case None | str():
            return value
        case [one]:
            return canonical_text(one)
        case float():
            return str(int(value)) if value.is_integer() else format(Decimal(repr(value)), "f")
        case _:
            return json.dumps(value, ensure_ascii=False)


def shown(value: Json) -> str:
    """A value as JSON, as much of it as a message has room for."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def is_float(value: float) -> bool:
    """Whether an integer or float is one that a float can hold, to its last digits."""
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**1023


def explain(error: ValueError) -> str:
    """What is wrong with a text that was to be decoded or parsed, in one sentence."""
    if isinstance(error, UnicodeDecodeError):
        if error.object[:2] in UTF_16_MARKS:
            return "not UTF-8 but UTF-16; save the file as UTF-8."
        return f"not UTF-8 at byte {error.start}."
    if isinstance(error, json.JSONDecodeError):
        before, at = error.doc[: error.pos].rstrip(), error.doc[error.pos : error.pos + 1]
        trailing = before.endswith(",") and at in ("}", "]")
        return "not valid JSON: trailing comma." if trailing else f"not valid JSON: {error.msg} (column {error.colno})."
    return f"{error}."


def _object_of(value: dict[object, object], path: str, depth: int) -> dict[str, Json]:
    found: dict[str, Json] = {}
    for key, item in value.items():
        name = key if isinstance(key, str) else canonical_text(plain(key, f"a key of {_named(path)}", depth + 1))
        if name is None or name in found:
            raise ValueError(f"{_named(path)} holds a key twice or one that is null")
        found[_text(name, f"a key of {_named(path)}")] = plain(item, f"{path}.{name}" if path else name, depth + 1)
    return found


def _text(value: str, path: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{_named(path)} holds a lone surrogate at character {error.start}") from error
    return value


def _decimal(value: Decimal, path: str) -> Json:
    if not value.is_finite():
        raise ValueError(f"{_named(path)} is {value}, which is no value; write null or leave it out")
    if value == value.to_integral_value():
        return int(value)
    return float(value) if Decimal(repr(float(value))) == value else format(value, "f")


def _named(path: str) -> str:
    return path or "the row"


def _object(pairs: Sequence[tuple[str, Json]]) -> dict[str, Json]:
    """Raises ValueError where a key is there twice: whichever was taken, the other one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {json.dumps(repeated)} given twice")
    return found


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value) or (value == 0.0 and re.search("[1-9]", re.split("[eE]", text)[0])):
        shown = text if len(text) <= 24 else f"{text[:24]}..."
        raise ValueError(f"the number {shown} is outside what a float can hold; write it as text")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"not valid JSON: {name}")


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)
"""Parses JSON, and raises ValueError where something would be lost."""
LENIENT_DECODER = json.JSONDecoder(parse_int=len, parse_float=len)
"""Finds the end of a value that DECODER refuses."""
