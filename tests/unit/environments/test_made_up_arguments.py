"""Arguments for a dry run: what a tool's own schema accepts."""

import json
from collections.abc import Mapping
from datetime import date
from enum import Enum
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from rlhf.environments.made_up_arguments import made_up_arguments
from rlhf.environments.tools import make_tool
from rlhf.types import Json


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Place(BaseModel):
    name: str
    near: "Place | None" = None
    size: Annotated[float, Field(gt=2, lt=2.5)]


def plain(a: int, b: float, c: str, d: bool, e: None) -> None:
    """Plain types."""


def chosen(color: Color, mode: Literal["x", "y"], either: int | str, maybe: str | None, left_out: int = 3) -> None:
    """One of several."""


def bounded(
    high: Annotated[int, Field(ge=7)],
    low: Annotated[int, Field(lt=-3)],
    even: Annotated[int, Field(multiple_of=4)],
    between: Annotated[float, Field(gt=0, lt=0.5)],
    long: Annotated[str, Field(min_length=9)],
    short: Annotated[str, Field(max_length=2)],
    several: Annotated[list[int], Field(min_length=3)],
) -> None:
    """Bounds."""


def nested(place: Place, when: date, pair: tuple[int, str], table: dict[str, int], places: list[Place]) -> None:
    """Values with parts."""


@pytest.mark.parametrize("function", [plain, chosen, bounded, nested])
def test_made_up_arguments_are_accepted_by_the_tool(function: object) -> None:
    tool = make_tool(function)  # type: ignore[arg-type]
    schema: Mapping[str, Json] = json.loads(json.dumps(tool.schema["function"]["parameters"]))  # type: ignore[index]
    arguments = made_up_arguments(schema)
    tool.bind(arguments)
    assert set(arguments) == set(json.loads(json.dumps(schema["required"])))


def test_what_no_schema_says_is_a_text() -> None:
    assert made_up_arguments({"type": "object", "properties": {"x": {}}, "required": ["x"]}) == {"x": "text"}
    assert made_up_arguments({"type": "object", "properties": {}}) == {}
