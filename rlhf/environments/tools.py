"""Python functions as tools: their JSON schema from type hints and docstring, and calls with checked arguments."""

import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from pydantic import BaseModel, ConfigDict, PydanticUserError, ValidationError, create_model
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError
from pydantic.fields import FieldInfo

Function = Callable[..., object]

SECTION = re.compile(r"\n\s*(?:Args|Arguments|Parameters|Returns|Yields|Raises|Examples?|Notes?):\s*(?:\n|$)")
ARGUMENTS = re.compile(
    r"(?:^|\n)(?P<indent>[ \t]*)(?:Args|Arguments|Parameters):[ \t]*\n(?P<body>(?:(?P=indent)[ \t]+.*\n?|[ \t]*\n)*)"
)
ARGUMENT = re.compile(r"(?P<indent>[ \t]+)(?P<name>\w+)[ \t]*(?:\([^)]*\))?:[ \t]*(?P<text>.*)")
KEPT_OUT = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


class ToolError(ValueError):
    """A function cannot be a tool. Says why."""


class CallError(Exception):
    """A call does not fit a tool. Says how, in words for the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the model may call. `schema` is what a chat template gets: {type, function: {name, description,
    parameters}}."""

    name: str
    function: Function
    arguments: type[BaseModel]
    schema: dict[str, object]

    def bind(self, arguments: object, *owner: object) -> Function:
        """The function with checked arguments, to be called without any; `owner` is the object of a method. Raises
        CallError where the arguments are not those of its schema."""
        try:
            checked = self.arguments.model_validate(arguments)
        except ValidationError as error:
            raise CallError(f"arguments of {self.name}: {_first_lines(error)}") from error
        # Not model_dump: nested models stay what the hints say. Arguments with a default may be left out.
        given = {name: vars(checked)[name] for name in checked.model_fields_set}
        return partial(self.function, *owner, **given)


def make_tool(function: Function, *, is_method: bool = False) -> Tool:
    """A function, or a method as its class has it, as a tool. Raises ToolError where a hint or the docstring is
    missing, or where it takes what a JSON object cannot give."""
    name = function.__name__
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, ValueError) as error:
        raise ToolError(f"its signature cannot be read ({error})") from error
    text = inspect.getdoc(function)
    if not text or not text.strip():
        raise ToolError("it has no docstring, from which the model learns what it does")
    described = _argument_texts(text)
    fields: dict[str, tuple[object, object]] = {}
    for parameter in list(signature.parameters.values())[is_method:]:
        if parameter.kind in KEPT_OUT:
            raise ToolError(f"{KEPT_OUT[parameter.kind]}{parameter.name} has no schema; name each parameter")
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise ToolError(f"{parameter.name} can be given by place only, and calls name their arguments")
        if parameter.name not in hints:
            raise ToolError(f"{parameter.name} has no type hint")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], _field(default, described.get(parameter.name)))
    try:
        arguments = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)  # type: ignore[call-overload]
        parameters = _without_titles(arguments.model_json_schema())
    except (PydanticSchemaGenerationError, PydanticInvalidForJsonSchema, PydanticUserError, NameError) as error:
        raise ToolError(f"its hints have no JSON schema ({str(error).splitlines()[0]})") from error
    schema = {"name": name, "description": _summary(text), "parameters": parameters}
    return Tool(name=name, function=function, arguments=arguments, schema={"type": "function", "function": schema})


def _field(default: object, description: str | None) -> FieldInfo:
    return FieldInfo(default=default, description=description) if description else FieldInfo(default=default)


def _summary(text: str) -> str:
    """A docstring up to its first section, on one line a paragraph."""
    first = SECTION.split(f"\n{text}", maxsplit=1)[0].strip()
    return "\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", first)) or text.strip()


def _argument_texts(text: str) -> dict[str, str]:
    """What the section Args of a docstring says of each parameter: `name: text`, also over several lines."""
    section = ARGUMENTS.search(text)
    found: dict[str, str] = {}
    name, indent = "", -1
    for line in section["body"].splitlines() if section else ():
        start = ARGUMENT.fullmatch(line)
        if start and (indent < 0 or len(start["indent"]) <= indent):
            name, indent = start["name"], len(start["indent"])
            found[name] = start["text"].strip()
        elif name and line.strip():
            found[name] = f"{found[name]} {line.strip()}".strip()
    return {name: described for name, described in found.items() if described}


def _without_titles(schema: object, *, is_map: bool = False) -> object:
    """A schema without the titles that pydantic makes of the names. A property may be called title."""
    if isinstance(schema, dict):
        return {
            key: _without_titles(value, is_map=key in ("properties", "$defs") and not is_map)
            for key, value in schema.items()
            if key != "title" or is_map
        }
    return [_without_titles(item) for item in schema] if isinstance(schema, list) else schema


def _first_lines(error: ValidationError) -> str:
    """What is wrong with arguments, on one line."""
    return "; ".join(
        f"{'.'.join(map(str, one['loc'])) or 'the object'}: {one['msg']}" for one in error.errors(include_url=False)[:3]
    )
