"""Environments of other libraries. `rollout.environment` names one as `LIBRARY://WHAT?option=value`; each library has a
module here, whose function `environment` makes the class."""

import importlib
import json
from collections.abc import Mapping
from urllib.parse import parse_qsl

from rlhf.types import Json

MODULES: Mapping[str, str] = {"gym": "gym", "openenv": "openenv", "openrlhf": "openrlhf"}
"""What stands before `://`, and the module."""


def load(name: str) -> object:
    """The class that `LIBRARY://WHAT` names. Raises ValueError where there is none, ImportError without the library."""
    library, _, what = name.partition("://")
    if library not in MODULES:
        raise ValueError(f"no library {library}; have {', '.join(MODULES)}")
    module = importlib.import_module(f"{__name__}.{MODULES[library]}")
    found: object = module.environment(what)
    return found


def with_options(what: str) -> tuple[str, dict[str, Json]]:
    """`WHAT?option=value&...` as WHAT and its options: values as JSON where they are, else as text."""
    name, _, query = what.partition("?")
    return name, {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)}


def _value(text: str) -> Json:
    try:
        value: Json = json.loads(text)
    except ValueError:
        return text
    return value
