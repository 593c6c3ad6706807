"""Calls whose arguments have tags of their own: Qwen 3.5, Qwen 3 Coder and GLM 4.5. Texts stand there without quotes,
so that only the tool's schema tells the text "5" from the number."""

import json
import re
from collections.abc import Sequence

from rlhf.environments.calls import Call, Said, UnreadCall
from rlhf.environments.formats.json_calls import HERMES, split_thoughts
from rlhf.types import Json

QWEN_CALL = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>\s*|\Z)", re.DOTALL)
QWEN_ARGUMENT = re.compile(r"<parameter=([^>]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)
GLM_CALL = re.compile(r"\s*([^\s<]+)\s*((?:<arg_key>.*)?)", re.DOTALL)
GLM_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)(?:</arg_value>|\Z)", re.DOTALL)
PYTHON = {"True": True, "False": False, "None": None}
"""As templates write these values that print them by Python."""


def read_qwen(text: str, tools: Sequence[Json]) -> Said:
    """`<tool_call><function=name><parameter=key>value</parameter>...</function></tool_call>`, any number of them."""
    return _read(text, tools, QWEN_CALL, QWEN_ARGUMENT)


def read_glm(text: str, tools: Sequence[Json]) -> Said:
    """`<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>...</tool_call>`, any number of them."""
    return _read(text, tools, GLM_CALL, GLM_ARGUMENT)


def _read(text: str, tools: Sequence[Json], form: re.Pattern[str], argument: re.Pattern[str]) -> Said:
    thoughts, said = split_thoughts(text)
    calls = tuple(_call(form.fullmatch(found[1]), argument, tools) for found in HERMES.finditer(said))
    return Said(text=HERMES.sub("", said).strip(), calls=calls, thoughts=thoughts)


def _call(found: re.Match[str] | None, argument: re.Pattern[str], tools: Sequence[Json]) -> Call | UnreadCall:
    if found is None:
        return UnreadCall(why="the call has no name of a function in its place")
    schemas = _schemas(found[1], tools)
    given = {key.strip(): _value(value, schemas.get(key.strip())) for key, value in argument.findall(found[2])}
    return Call(name=found[1], arguments=given)


def _schemas(name: str, tools: Sequence[Json]) -> dict[str, Json]:
    """The schema of each parameter of a tool; none of an unknown one."""
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and function.get("name") == name:
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, dict) else None
            return properties if isinstance(properties, dict) else {}
    return {}


def _value(text: str, schema: Json) -> Json:
    """The value that a text stands for: a text where only texts fit, else JSON where it is any that fits."""
    types = _types(schema)
    if types == {"string"}:
        return text
    try:
        value: Json = PYTHON[text] if text in PYTHON else json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if "string" in types and _type(value) not in types else value


def _types(schema: Json) -> set[str]:
    """The JSON types that a schema names; none where it does not say."""
    if not isinstance(schema, dict):
        return set()
    named = schema.get("type")
    found = {named} if isinstance(named, str) else {str(one) for one in named} if isinstance(named, list) else set()
    for key in ("anyOf", "oneOf"):
        if isinstance(others := schema.get(key), list):
            found = found.union(*map(_types, others))
    if isinstance(choices := schema.get("enum"), list):
        found |= {_type(one) for one in choices}
    return found | ({"integer"} if "number" in found else set())


def _type(value: Json) -> str:
    if value is None:
        return "null"
    names = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"))
    return next((name for kind, name in names if isinstance(value, kind)), "object")
