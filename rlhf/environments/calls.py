"""Calls of tools in what a model wrote, and how a turn with calls is written for its chat template."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from rlhf.conversations.messages import REASONING, MessageError, check_texts
from rlhf.types import Json, Message

THOUGHTS = re.compile(r"^.*</think>", re.DOTALL)
"""What a model thinks may hold calls that it does not make."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: dict[str, Json]
    id: str = field(default="", compare=False)
    """By which what comes back names it; empty where the model writes none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadCall:
    """Text in the place of a call that is none. `why` is written for the model."""

    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a turn says, taken apart. `text` has no calls, and no thoughts."""

    text: str
    calls: tuple[Call | UnreadCall, ...] = ()
    thoughts: str = ""


Parser: TypeAlias = Callable[[str, Sequence[Json]], Said]
"""A turn's text without the token that ends it, and the tools that it may call -> what it says."""


def whole(said: Said, content: str) -> Message:
    """A turn for a template that takes what the model wrote as the content."""
    return Message(role="assistant", content=content)


def apart(said: Said, content: str) -> Message:
    """A turn for a template that takes thoughts, text and calls apart. Calls that could not be read are left out."""
    read = [call for call in said.calls if isinstance(call, Call)]
    calls: list[Json] = [
        {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
        for call in read
    ]
    fields: dict[str, Json] = {REASONING[0]: said.thoughts} if said.thoughts else {}
    if calls:
        fields["tool_calls"] = calls
    return Message(role="assistant", content=said.text, fields=fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """A form in which turns with calls are written."""

    read: Parser
    beside: Callable[[Said, str], str] = lambda said, content: said.text
    """What is said and the text of a turn -> what a client reads of it, besides its calls."""
    message: Callable[[Said, str], Message] = whole
    """What is said and the text of a turn -> the turn as the chat template takes it."""

    @property
    def takes_apart(self) -> bool:
        """Whether the template takes calls apart from the text: then it takes results of these calls alone."""
        return self.message is not whole


def only_text(text: str, tools: Sequence[Json]) -> Said:
    """All of it, where nothing is a call."""
    return Said(text=text)


NO_CALLS = CallFormat(read=only_text)
"""Nothing is a call: there are no tools."""


def keep_thoughts(said: Said, content: str) -> str:
    """What a turn says besides its calls, with the tagged thoughts before it; all of a turn that calls nothing."""
    if not said.calls:
        return content
    return (found[0] if (found := THOUGHTS.match(content)) else "") + said.text


def read_call(content: str, keys: Sequence[str] = ("arguments",)) -> Call | UnreadCall:
    """A JSON object with a name and, under one of `keys`, arguments; a call's id, where it has one."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        return UnreadCall(why=f"the call is no JSON ({str(error)[:100]})")
    return call_of(value, keys)


def call_of(value: Json, keys: Sequence[str] = ("arguments",)) -> Call | UnreadCall:
    """As `read_call`, of the JSON value itself."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return UnreadCall(why='the call is no object with "name" and "arguments"')
    arguments = next((value[key] for key in keys if key in value), {})
    number = value.get("id")
    return named_call(str(value["name"]), arguments, str(number) if isinstance(number, str) else "")


def named_call(name: str, arguments: Json, number: str = "") -> Call | UnreadCall:
    """A call of `name`, with arguments as an object or as JSON text."""
    if not name.strip():
        return UnreadCall(why="the call has no name of a function")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        return UnreadCall(why=f"the arguments of {name} are no JSON object")
    return Call(name=name, arguments=arguments, id=number)


def checked_call(call: Call | UnreadCall) -> Call | UnreadCall:
    """The call, if its texts can be said again: JSON can also write NUL and half of a surrogate pair, which no
    tokenizer takes."""
    if isinstance(call, UnreadCall):
        return replace(call, why=call.why.encode(errors="replace").decode())
    try:
        check_texts([call.name, call.arguments, call.id], "the call")
    except (MessageError, RecursionError) as error:
        return UnreadCall(why=str(error))
    return call
