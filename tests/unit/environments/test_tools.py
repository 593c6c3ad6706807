"""Functions as tools: schemas, checked arguments, and what cannot be one."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from rlhf.environments.tools import CallError, ToolError, make_tool
from tests.unit.environments import agent_tools


def test_a_schema_comes_from_hints_and_docstring() -> None:
    tool = make_tool(agent_tools.add)
    assert tool.schema == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two whole numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "the first one"},
                    "b": {"type": "integer", "description": "the second one, or 1", "default": 1},
                },
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    }


def test_hints_may_be_rich() -> None:
    def search(
        title: str,
        kind: Literal["web", "news"],
        filters: dict[str, list[int]] | None = None,
        top: Annotated[int, Field(le=5)] = 3,
    ) -> str:
        """Search.

        Over several lines.

        Returns:
            what was found
        """
        return f"{title} {kind} {filters} {top}"

    tool = make_tool(search)
    function: Any = tool.schema["function"]
    assert function["description"] == "Search.\nOver several lines."
    assert set(function["parameters"]["properties"]) == {"title", "kind", "filters", "top"}
    assert function["parameters"]["properties"]["kind"] == {"enum": ["web", "news"], "type": "string"}
    assert tool.bind({"title": "x", "kind": "web"})() == "x web None 3"
    with pytest.raises(CallError, match=r"arguments of search: top: Input should be less than or equal to 5$"):
        tool.bind({"title": "x", "kind": "web", "top": 9})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "arguments of add: a: Field required"),
        ({"a": "two"}, "arguments of add: a: Input should be a valid integer"),
        ({"a": 1, "c": 2}, "arguments of add: c: Extra inputs are not permitted"),
        ([1, 2], "arguments of add: the object: Input should be a valid dictionary"),
    ],
)
def test_arguments_are_checked(arguments: object, said: str) -> None:
    with pytest.raises(CallError) as caught:
        make_tool(agent_tools.add).bind(arguments)
    assert str(caught.value).startswith(said)


def test_texts_of_numbers_are_numbers() -> None:
    assert make_tool(agent_tools.add).bind({"a": "2", "b": 3.0})() == 5


def test_methods_get_their_object_first() -> None:
    shelf = agent_tools.Shelf()
    tool = make_tool(agent_tools.Shelf.put, is_method=True)
    assert tool.bind({"what": "book"}, shelf)() == "1 kept"
    assert tool.bind({"what": "cup"}, shelf)() == "2 kept"


def no_text(a: int) -> int:
    return a


def no_hint(a) -> int:  # type: ignore[no-untyped-def]
    """Add."""
    return int(a)


def starred(*values: int) -> int:
    """Add."""
    return sum(values)


def keywords(**values: int) -> int:
    """Add."""
    return sum(values.values())


def by_place(a: int, /) -> int:
    """Add."""
    return a


def strange(a: object, b: "Missing") -> None:  # type: ignore[name-defined]  # noqa: F821
    """Add."""


def unfit(a: agent_tools.Shelf) -> None:
    """Add."""


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (no_text, "it has no docstring"),
        (no_hint, "a has no type hint"),
        (starred, r"\*values has no schema"),
        (keywords, r"\*\*values has no schema"),
        (by_place, "a can be given by place only"),
        (strange, "its signature cannot be read .*Missing"),
        (unfit, "its hints have no JSON schema"),
    ],
)
def test_what_is_no_tool_is_refused_by_name(function: Any, why: str) -> None:
    with pytest.raises(ToolError, match=why):
        make_tool(function)
