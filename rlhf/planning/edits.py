"""A config with other values, by dotted keys."""

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import TypeVar

from rlhf.config.base import Section

S = TypeVar("S", bound=Section)


def edited(config: S, values: Mapping[str, object]) -> S:
    """`config` with `values` at their dotted keys, which must exist. Values are not validated again."""
    for key, value in values.items():
        config = _with(config, key.split("."), value)
    return config


def changes(config: Section, values: Mapping[str, object]) -> dict[str, object]:
    """The values that differ from those of `config`."""
    return {key: value for key, value in values.items() if edited(config, {key: value}) != config}


def _with(config: S, path: Sequence[str], value: object) -> S:
    name, *rest = path
    old = dict(config)[name]
    match old, rest:
        case _, []:
            new = value
        case Section(), _:
            new = _with(old, rest, value)
        case tuple(), [index, *inner]:
            new = tuple(_with(one, inner, value) if n == int(index) else one for n, one in enumerate(old))
        case _:
            raise KeyError(".".join(path))
    return config.model_copy(update={name: new})


def as_flags(values: Mapping[str, object]) -> str:
    """The edits as flags of a command line."""
    words: list[str] = []
    for key, value in values.items():
        flag = "--" + key.replace("_", "-")
        for one in value if isinstance(value, tuple) else (value,):
            words += [flag, one if isinstance(one, str) else json.dumps(one)]
    return shlex.join(words)
