"""Environments of other libraries. `rollout.environment` names one as `LIBRARY://WHAT?option=value`, and so does
`rollout.agent` where the library runs the episodes itself; each library has a module here."""

import importlib
import json
from collections.abc import Mapping
from urllib.parse import parse_qsl

from rlhf.types import Json

MAKERS: Mapping[str, str] = {
    "gym": "environment",
    "openenv": "environment",
    "openrlhf": "environment",
    "verifiers": "agent",
}
"""What stands before `://`, which is the module's name, and its function that makes a class or an agent."""


def load(name: str) -> object:
    """The class or agent that `LIBRARY://WHAT` names. Raises ValueError where there is none, ImportError without the
    library."""
    library, _, what = name.partition("://")
    if library not in MAKERS:
        raise ValueError(f"no library {library}; have {', '.join(MAKERS)}")
    module = importlib.import_module(f"{__name__}.{library}")
    found: object = getattr(module, MAKERS[library])(what)
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
