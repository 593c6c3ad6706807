"""The forms in which chat templates want messages: which key thoughts have, and what null contents, arguments and texts
look like. Templates agree on none of these, and leave out in silence what comes in another form."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from rlhf.conversations.messages import REASONING
from rlhf.types import Json, Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How messages are written for a template."""

    reasoning: str = REASONING[0]
    """Key of an assistant's thoughts."""
    null: bool = False
    """Whether a content that is empty is null."""
    text_arguments: bool = False
    """Whether the arguments of a call are JSON text, and no object."""
    parts: bool = False
    """Whether contents are lists of one part."""


def forms_for(messages: Sequence[Message], template: str) -> Iterator[Form]:
    """The forms that differ for these messages, the most usual one first. Thoughts have the keys that the template's
    text names."""
    calls = any("tool_calls" in message.fields for message in messages)
    thoughts = any(REASONING[0] in message.fields for message in messages)
    empty = any(not message.content for message in messages)
    named = [key for key in REASONING if re.search(rf"\b{key}\b", template)] if thoughts else []
    for parts, null, text_arguments, reasoning in product(
        (False, True), (False, True)[: 1 + empty], (False, True)[: 1 + calls], named or REASONING[:1]
    ):
        yield Form(parts=parts, reasoning=reasoning, null=null, text_arguments=text_arguments)


def write(message: Message, form: Form) -> dict[str, Json]:
    """A message in the given form."""
    fields = dict(message.fields)
    content: Json = message.content
    if form.null and not message.content:
        content = None
    elif form.parts:
        content = [{"type": "text", "text": message.content}] if message.content else []
    if REASONING[0] in fields:
        fields[form.reasoning] = fields.pop(REASONING[0])
    if isinstance(calls := fields.get("tool_calls"), list):
        fields["tool_calls"] = [_call(call, form) for call in calls]
    return {"role": message.role, "content": content, **fields}


def _call(call: Json, form: Form) -> Json:
    assert isinstance(call, dict), "calls were checked when they were read"
    function = call["function"]
    assert isinstance(function, dict), "calls were checked when they were read"
    return {**call, "function": {**function, "arguments": _arguments(function["arguments"], form.text_arguments)}}


def _arguments(given: Json, as_text: bool) -> Json:
    """Arguments as an object or as text. Text that is no JSON object stays text."""
    if as_text:
        return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    return object_of(given)


def object_of(arguments: Json) -> Json:
    """The object that JSON text holds; anything else as it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value: Json = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
