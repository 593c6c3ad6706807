"""Calls of tools in what a model wrote, in the form that its chat template writes them."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rlhf.conversations.turns import LeftOutError, RewrittenError, answer_text
from rlhf.engines.base import Tokenizer
from rlhf.errors import DataError, ModelError
from rlhf.types import Json, Message

THOUGHTS = re.compile(r"^.*</think>", re.DOTALL)
"""What a model thinks may hold calls that it does not make."""
HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: dict[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadCall:
    """Text in the place of a call that is none. `why` is written for the model."""

    why: str


Parser: TypeAlias = Callable[[str], list[Call | UnreadCall]]
"""A turn's text, without special tokens at its end -> its calls, in order."""


def parse_hermes(text: str) -> list[Call | UnreadCall]:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them: Hermes, Qwen 2.5 and Qwen 3."""
    return [_call(found[1], ("arguments",)) for found in HERMES.finditer(THOUGHTS.sub("", text))]


def parse_llama(text: str) -> list[Call | UnreadCall]:
    """`{"name": ..., "parameters": {...}}` as the whole turn: Llama 3.1 and later."""
    content = text.strip().removeprefix("<|python_tag|>").strip()
    is_call = content.startswith("{") and re.search(r'"name"\s*:', content) is not None
    return [_call(content, ("parameters", "arguments"))] if is_call else []


def beside_hermes(text: str) -> str:
    """What a turn says besides its calls, what it thought included."""
    thoughts = found[0] if (found := THOUGHTS.match(text)) else ""
    return thoughts + HERMES.sub("", text[len(thoughts) :]).strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """A form in which calls are written."""

    read: Parser
    beside: Callable[[str], str]
    """A turn's text with calls -> what it says besides them."""


NO_CALLS = CallFormat(read=lambda text: [], beside=lambda text: text)
"""Nothing is a call: there are no tools."""
FORMATS: Mapping[str, CallFormat] = {
    "Hermes and Qwen": CallFormat(read=parse_hermes, beside=beside_hermes),
    "Llama 3": CallFormat(read=parse_llama, beside=lambda text: ""),
}
"""The forms that are known. That of a model is the one in which its template writes calls."""


def find_format(tokenizer: Tokenizer, tools: Sequence[Json]) -> CallFormat:
    """The form in which the chat template writes calls. Raises ModelError if it is not known."""
    calls = [Call(name="lookup", arguments={"key": "some words", "count": 3})]
    written: Json = [
        {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls
    ]
    question = Message(role="user", content="Hello")
    answer = Message(role="assistant", content="", fields={"tool_calls": written})

    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return tokenizer.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    try:
        text = answer_text(render, [question], answer, render([question], True))
    except (DataError, RewrittenError, LeftOutError) as error:
        raise ModelError(f"rollout.tools: the chat template writes no calls of tools ({error}).") from error
    text = _without_ends(tokenizer, text)
    found = next((one for one in FORMATS.values() if one.read(text) == calls), None)
    if found is None:
        shown = " ".join(text.split())[:160]
        raise ModelError(
            f"rollout.tools: the chat template writes calls in a form that is not read here ({shown}). Those of "
            f"{', '.join(FORMATS)} are; set data.chat_template."
        )
    return found


def _without_ends(tokenizer: Tokenizer, text: str) -> str:
    """A rendered turn up to the token that ends it."""
    stops = [tokenizer.decode([token], skip_special_tokens=False) for token in tokenizer.stop_token_ids]
    ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]


def _call(content: str, keys: Sequence[str]) -> Call | UnreadCall:
    """A JSON object with a name and, under one of `keys`, arguments."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        return UnreadCall(why=f"the call is no JSON ({str(error)[:100]})")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return UnreadCall(why='the call is no object with "name" and "arguments"')
    arguments: object = next((value[key] for key in keys if key in value), {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return UnreadCall(why=f"the arguments of {value['name']} are no JSON object")
    if not isinstance(arguments, dict):
        return UnreadCall(why=f"the arguments of {value['name']} are no JSON object")
    return Call(name=value["name"], arguments=arguments)
