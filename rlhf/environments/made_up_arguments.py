"""Arguments that fit a JSON schema, for trying a tool before a model calls it."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from rlhf.types import Json

FORMATS: Mapping[str, str] = {
    "date": "2024-01-31",
    "date-time": "2024-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "duration": "PT1M",
    "email": "someone@example.org",
    "uri": "https://example.org/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}
"""Texts of the formats that pydantic writes."""
TEXT = "text"
MAX_DEPTH = 8
"""A schema may hold itself."""


def made_up_arguments(parameters: Mapping[str, Json]) -> dict[str, Json]:
    """A value for each parameter that must be given. What bounds and patterns say together is not solved: such a value
    may be refused, as one of a model's may."""
    made = _value(dict(parameters), parameters.get("$defs"), 0)
    return made if isinstance(made, dict) else {}


def _value(schema: Json, definitions: Json, depth: int) -> Json:
    """A value that fits a schema: the first of those that it lists, else one of its type."""
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return None
    if isinstance(name := schema.get("$ref"), str):
        known = definitions.get(name.rpartition("/")[2]) if isinstance(definitions, dict) else None
        return _value(known, definitions, depth + 1)
    given = [schema[key] for key in ("const", "default") if key in schema]
    for key in ("enum", "examples"):
        given += listed[:1] if isinstance(listed := schema.get(key), list) else []
    if given:
        return given[0]
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(kinds := schema.get(key), list) and kinds:
            return _value(kinds[0], definitions, depth + 1)
    make = MAKERS.get(str(schema.get("type")))
    return TEXT if make is None else make(schema, definitions, depth)


def _object(schema: Mapping[str, Json], definitions: Json, depth: int) -> Json:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return {}
    return {str(name): _value(properties.get(str(name)), definitions, depth + 1) for name in required}


def _array(schema: Mapping[str, Json], definitions: Json, depth: int) -> Json:
    if isinstance(parts := schema.get("prefixItems"), list):
        return [_value(part, definitions, depth + 1) for part in parts]
    fewest = schema.get("minItems", 1)
    item = _value(schema.get("items", {}), definitions, depth + 1)
    return [item] * (fewest if isinstance(fewest, int) else 1)


def _text(schema: Mapping[str, Json], _definitions: Json, _depth: int) -> Json:
    fewest, most = schema.get("minLength", 0), schema.get("maxLength", len(TEXT))
    text = FORMATS.get(str(schema.get("format")), TEXT)
    if isinstance(fewest, int) and len(text) < fewest:
        text += "x" * (fewest - len(text))
    return text[:most] if isinstance(most, int) and "maxLength" in schema else text


def _number(schema: Mapping[str, Json], _definitions: Json, _depth: int) -> Json:
    """1, or the number within bounds that is next to it."""
    number: float = 1
    whole = schema.get("type") == "integer"
    least, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    most, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if isinstance(least, int | float):
        number = max(number, least)
    if isinstance(above, int | float) and number <= above:
        number = above + 1
    if isinstance(most, int | float):
        number = min(number, most)
    if isinstance(below, int | float) and number >= below:
        number = below - 1 if whole or not isinstance(above, int | float) else (above + below) / 2
    step = schema.get("multipleOf")
    if isinstance(step, int | float) and step:
        number = step * max(1, round(number / step))
    return int(number) if whole else number


Maker: TypeAlias = Callable[[Mapping[str, Json], Json, int], Json]
MAKERS: Mapping[str, Maker] = {
    "object": _object,
    "array": _array,
    "string": _text,
    "integer": _number,
    "number": _number,
    "boolean": lambda _schema, _definitions, _depth: True,
    "null": lambda _schema, _definitions, _depth: None,
}
