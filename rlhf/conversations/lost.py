"""What a chat template left out: every content, thought, call and tool of a conversation is looked for in the text that
the template made of it, in order."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rlhf.conversations.forms import object_of
from rlhf.conversations.messages import REASONING
from rlhf.types import Json, Message

TAG = re.compile(r"</?(?:think|thinking|thought|reasoning)>")
CLOSING = re.compile(r"</(?:think|thinking|thought|reasoning)>")
"""Tags around an assistant's thoughts inside its content, which templates may write in another way."""
UNSAID_KEYS = {"type", "strict"}
"""Keys of a tool whose values templates write in words of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A part of the message at `index` that is not in the text: `what` is its key. `thought` says that an assistant
    thought it, and did not say it."""

    index: int
    what: str
    thought: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What must be in the text, in one of the ways in which it may be written."""

    what: str
    texts: tuple[str, ...]
    thought: bool = False


def lost_messages(messages: Sequence[Message], text: str) -> list[Lost]:
    """The parts of messages that `text` does not show in the order of the messages. The parts of one message may come
    in any order, and a system message anywhere. Spaces around a part do not count."""
    lost: list[Lost] = []
    start = 0
    for index, message in enumerate(messages):
        first = 0 if message.role == "system" else start
        pieces = list(pieces_of(message))
        ends = {piece: _end(text, first, piece.texts) for piece in pieces}
        said = max((end for piece, end in ends.items() if not piece.thought), default=-1)
        # Thoughts stand before what is said. The same words later are another message's.
        limit = said if said >= 0 else len(text)
        lost += [
            Lost(index=index, what=piece.what, thought=piece.thought)
            for piece in pieces
            if ends[piece] < 0 or (piece.thought and ends[piece] > limit)
        ]
        if message.role != "system":
            start = max(start, said)
    return lost


def lost_tools(tools: Sequence[Json], text: str) -> tuple[list[int], int]:
    """The tools whose names `text` does not show, and how many words and numbers of the others it leaves out."""
    hidden: list[int] = []
    count = 0
    for index, tool in enumerate(tools):
        name, *others = _tool_texts(tool)
        if name not in text:
            hidden.append(index)
        else:
            count += sum(_end(text, 0, written(other)) < 0 for other in others)
    return hidden, count


def python_arguments(messages: Sequence[Message], text: str) -> int:
    """How many calls have arguments that `text` shows the way Python prints them, which is no JSON."""
    found = 0
    for message in messages:
        calls = message.fields.get("tool_calls")
        for call in calls if isinstance(calls, list) else []:
            function = call["function"] if isinstance(call, dict) else None
            arguments = object_of(function["arguments"]) if isinstance(function, dict) else None
            found += isinstance(arguments, dict) and str(arguments) != json.dumps(arguments) and str(arguments) in text
    return found


def pieces_of(message: Message) -> Iterator[Piece]:
    """Everything that a message says."""
    said, thoughts = split_thoughts(message)
    for thought in thoughts:
        yield Piece(what="content", texts=written(thought), thought=True)
    if REASONING[0] in message.fields:
        yield Piece(what=REASONING[0], texts=written(str(message.fields[REASONING[0]]).strip()), thought=True)
    for text in said:
        yield Piece(what="content", texts=written(text))
    calls = message.fields.get("tool_calls")
    for number, call in enumerate(calls if isinstance(calls, list) else []):
        assert isinstance(call, dict), "calls were checked when they were read"
        function = call["function"]
        assert isinstance(function, dict), "calls were checked when they were read"
        what = f"tool_calls[{number}]"
        yield Piece(what=what, texts=written(str(function["name"])))
        for leaf in leaves(object_of(function["arguments"])):
            yield Piece(what=what, texts=leaf)


def split_thoughts(message: Message) -> tuple[list[str], list[str]]:
    """What a message's content says, and what it thinks before: an assistant's text up to its last closing tag. Tags
    and blank texts are left out."""
    content = message.content
    if message.role != "assistant":
        return ([content.strip()] if content.strip() else []), []
    ends = [found.end() for found in CLOSING.finditer(content)]
    end = ends[-1] if ends else 0
    thoughts, said = (
        [part.strip() for part in TAG.split(text) if part.strip()] for text in (content[:end], content[end:])
    )
    return said, thoughts


def leaves(value: Json) -> Iterator[tuple[str, ...]]:
    """The keys and values inside arguments, each in the ways in which it may be written. Null is nothing."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield written(key)
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    elif isinstance(value, str):
        if value.strip():
            yield written(value.strip())
    elif value is not None:
        yield (json.dumps(value), str(value))


@lru_cache(maxsize=512)  # the texts of a row or two: each is looked for in several renders
def written(text: str) -> tuple[str, ...]:
    """A text as it is, inside JSON, and inside JSON inside JSON."""
    found = [text]
    for ascii_only in (False, True):
        once = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        found += [once, json.dumps(once, ensure_ascii=ascii_only)[1:-1]]
    return tuple(dict.fromkeys(found))


def _end(text: str, start: int, alternatives: Sequence[str]) -> int:
    """Where the first of the alternatives that comes after `start` ends; -1: none does."""
    ends = [place + len(one) for one in alternatives if (place := text.find(one, start)) >= 0]
    return min(ends, default=-1)


def _tool_texts(tool: Json) -> list[str]:
    """A tool's name, and every other text and number that it holds."""
    assert isinstance(tool, dict), "tools were checked when they were read"
    function = tool.get("function", tool)
    assert isinstance(function, dict), "tools were checked when they were read"
    rest = {key: value for key, value in function.items() if key != "name"}
    return [str(function["name"]), *_schema_texts(rest)]


def _schema_texts(value: Json) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "properties" and isinstance(inner, dict):
                yield from inner
                for one in inner.values():
                    yield from _schema_texts(one)
            elif key not in UNSAID_KEYS:
                yield from _schema_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _schema_texts(inner)
    elif isinstance(value, str):
        yield from [value.strip()] if value.strip() else []
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)
