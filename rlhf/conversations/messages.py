"""Messages as rows hold them: every key is read, or named. What a chat template gets of a message is all of it."""

import json
from collections.abc import Iterator, Mapping

from rlhf.types import Json, Message

ROLES = {"system", "user", "assistant", "tool"}
OTHER_NAMES = {"human": "user", "gpt": "assistant", "developer": "system"}
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of what an assistant thought before it answered; the first is the name that it has here."""
READ_KEYS = frozenset({"role", "from", "content", "value", "tool_calls", "tool_call_id", "name", *REASONING})
"""The keys of a message that are read. Others are named where rows are read, and no template gets them."""
OLD_CALL = "function_call"


class MessageError(ValueError):
    """A message or tool is wrong. Says what and in which column."""


def parse_message(item: Json, where: str) -> Message:
    """A message {role, content, ...} or {from, value}. Raises MessageError naming `where` and the key."""
    if not isinstance(item, dict):
        raise MessageError(f"{where} is not a message (got {type(item).__name__}).")
    role = item.get("role", item.get("from"))
    if not isinstance(role, str) or OTHER_NAMES.get(role, role) not in ROLES:
        raise MessageError(f'{where}.role "{role}" unknown.')
    role = OTHER_NAMES.get(role, role)
    if item.get(OLD_CALL) is not None:
        raise MessageError(f"{where} holds {OLD_CALL}, an old form; write it as tool_calls.")
    fields: dict[str, Json] = {}
    if (reasoning := _reasoning(item, where)) is not None:
        fields[REASONING[0]] = reasoning
    if calls := _calls(item.get("tool_calls"), f"{where}.tool_calls"):
        fields["tool_calls"] = calls
    if fields and role != "assistant":
        raise MessageError(f"{where} holds {', '.join(fields)}, which only an assistant's message may.")
    for key in ("tool_call_id", "name"):
        if item.get(key) is not None:
            fields[key] = checked_text(item[key], f"{where}.{key}")
    content = _content(item.get("content", item.get("value")), f"{where}.content")
    if not content.strip() and not (role == "tool" and content is item.get("content")) and not _says(fields):
        raise MessageError(f"{where}.content is empty{', and there are no tool_calls' * (role == 'assistant')}.")
    return Message(role=role, content=content, fields=fields)


def as_json(message: Message) -> dict[str, Json]:
    """A message as rows hold it."""
    return {"role": message.role, "content": message.content, **message.fields}


def parse_tools(value: Json, where: str) -> tuple[Json, ...]:
    """The tools that a row offers: a list of objects with a name, also as JSON text. Raises MessageError."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise MessageError(f"{where} is text that is no JSON.") from error
    if value is None:
        return ()
    if not isinstance(value, list):
        raise MessageError(f"{where} is not a list of tools (got {type(value).__name__}).")
    for index, tool in enumerate(value):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise MessageError(f"{where}[{index}] is not a tool with a name.")
        check_texts(tool, f"{where}[{index}]")
    return tuple(value)


def conversation_of(metadata: Mapping[str, Json]) -> tuple[list[Message], tuple[Json, ...]]:
    """The messages and tools of a prompt that the chat template rendered."""
    messages = metadata.get("messages")
    turns = [
        Message(
            role=str(turn["role"]),
            content=str(turn["content"]),
            fields={key: value for key, value in turn.items() if key not in ("role", "content")},
        )
        for turn in (messages if isinstance(messages, list) else [])
        if isinstance(turn, dict)
    ]
    try:
        return turns, parse_tools(metadata.get("tools"), "tools")
    except MessageError:
        # Rows whose prompt was text may have any column of that name.
        return turns, ()


def texts_in(value: Json) -> Iterator[str]:
    """Every text inside a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)


def checked_text(value: Json, name: str) -> str:
    """A text that is not blank and that a tokenizer can take. Raises MessageError."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise MessageError(f"{name} is empty.")
    if not isinstance(value, str):
        raise MessageError(f"{name} is not text (got {type(value).__name__}).")
    check_texts(value, name)
    return value


def check_texts(value: Json, name: str) -> None:
    """Raise MessageError where a text inside `value` cannot be encoded."""
    for text in texts_in(value):
        if "\x00" in text:
            raise MessageError(f"{name} holds a NUL byte.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MessageError(f"{name} holds a lone surrogate at character {error.start}.") from error


def _says(fields: Mapping[str, Json]) -> bool:
    return any(key in fields for key in ("tool_calls", REASONING[0]))


def _content(value: Json, where: str) -> str:
    """A content as text: null is none, a list of parts is joined."""
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in value]
        if not all(isinstance(part, str) for part in parts):
            raise MessageError(f"{where} holds parts that are not text.")
        value = "".join(str(part) for part in parts)
    if value is not None and not isinstance(value, str):
        raise MessageError(f"{where} is not text (got {type(value).__name__}).")
    check_texts(value, where)
    return value or ""


def _reasoning(item: Mapping[str, Json], where: str) -> str | None:
    given = {key: item[key] for key in REASONING if item.get(key) not in (None, "")}
    if not given:
        return None
    texts = [checked_text(value, f"{where}.{key}") for key, value in given.items()]
    if len(set(texts)) > 1:
        raise MessageError(f"{where} holds {' and '.join(given)}, which differ.")
    return texts[0]


def _calls(value: Json, where: str) -> list[Json]:
    """Calls of tools as {type, function: {name, arguments}}, with whatever else each holds."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise MessageError(f"{where} is not a list of calls (got {type(value).__name__}).")
    return [_call(item, f"{where}[{index}]") for index, item in enumerate(value)]


def _call(item: Json, where: str) -> Json:
    if not isinstance(item, dict):
        raise MessageError(f"{where} is not a call (got {type(item).__name__}).")
    function = item.get("function")
    if function is None:
        function = {key: item[key] for key in ("name", "arguments") if key in item}
        item = {key: value for key, value in item.items() if key not in function}
    if not isinstance(function, dict):
        raise MessageError(f"{where}.function is not an object (got {type(function).__name__}).")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name.strip():
        raise MessageError(f"{where} has no function name.")
    if not isinstance(arguments, str | dict | None):
        raise MessageError(f"{where}: arguments must be an object or text (got {type(arguments).__name__}).")
    check_texts(item, where)
    check_texts(function, where)
    kept = {key: value for key, value in item.items() if value is not None}
    return {"type": "function", **kept, "function": {**function, "arguments": {} if arguments is None else arguments}}
