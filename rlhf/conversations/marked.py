"""Conversations whose short texts are replaced by unmistakable ones. That "4" or "ok" occurs in what a template made
says little: it may be part of any other word. A mark in its place occurs only where the template put it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count

from rlhf.conversations.forms import object_of
from rlhf.conversations.lost import TAG
from rlhf.conversations.messages import REASONING
from rlhf.types import Json, Message

SHORT = 12
"""Characters of a text from which on it is unlikely to occur by chance."""
FIRST_NUMBER = 7_770_001_000


class Marks:
    """Makes marks, a new one each time; the same one for the same name of a function."""

    def __init__(self) -> None:
        self._numbers = count()
        self._names: dict[str, str] = {}

    def text(self, given: str) -> str:
        """`given` with a mark in place of its text, where that is short. Spaces around it stay."""
        core = given.strip()
        if not core or len(core) >= SHORT:
            return given
        return given.replace(core, f"qz{next(self._numbers)}zq", 1)

    def name(self, given: str) -> str:
        """The mark of a function's name."""
        if len(given) >= SHORT:
            return given
        return self._names.setdefault(given, f"fz{len(self._names)}zf")

    def value(self, given: Json) -> Json:
        """Arguments with marks in place of short texts and of numbers."""
        if isinstance(given, dict):
            return {key: self.value(inner) for key, inner in given.items()}
        if isinstance(given, list):
            return [self.value(inner) for inner in given]
        if isinstance(given, str):
            return self.text(given)
        if isinstance(given, int | float) and not isinstance(given, bool):
            return FIRST_NUMBER + next(self._numbers)
        return given


def marked(messages: Sequence[Message], tools: Sequence[Json]) -> tuple[tuple[Message, ...], tuple[Json, ...]]:
    """A conversation of the same shape with marks in place of its short texts. The beginning of a conversation gets the
    same marks as the whole."""
    marks = Marks()
    shown = tuple(_tool(tool, marks) for tool in tools)
    return tuple(_marked(message, marks) for message in messages), shown


def _marked(message: Message, marks: Marks) -> Message:
    content, fields = message.content, dict(message.fields)
    if message.role == "assistant":
        tags = [*TAG.findall(content), ""]
        content = "".join(marks.text(part) + tag for part, tag in zip(TAG.split(content), tags, strict=True))
    elif content.strip()[:1] not in ("{", "["):
        content = marks.text(content)
    if REASONING[0] in fields:
        fields[REASONING[0]] = marks.text(str(fields[REASONING[0]]))
    if message.role == "tool" and "name" in fields:
        fields["name"] = marks.name(str(fields["name"]))
    if isinstance(calls := fields.get("tool_calls"), list):
        fields["tool_calls"] = [_call(call, marks) for call in calls]
    return replace(message, content=content, fields=fields)


def _call(call: Json, marks: Marks) -> Json:
    assert isinstance(call, dict), "calls were checked when they were read"
    function = call["function"]
    assert isinstance(function, dict), "calls were checked when they were read"
    arguments = marks.value(object_of(function["arguments"]))
    return {**call, "function": {**function, "name": marks.name(str(function["name"])), "arguments": arguments}}


def _tool(tool: Json, marks: Marks) -> Json:
    assert isinstance(tool, dict), "tools were checked when they were read"
    if isinstance(function := tool.get("function"), dict):
        return {**tool, "function": _tool(function, marks)}
    return {**tool, "name": marks.name(str(tool["name"]))}
