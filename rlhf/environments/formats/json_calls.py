"""Calls whose arguments are JSON: Hermes, Llama, Mistral, DeepSeek."""

import json
import re
from collections.abc import Sequence

from rlhf.environments.calls import THOUGHTS, Call, Said, UnreadCall, call_of, named_call, read_call
from rlhf.types import Json

HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
LLAMA_MARKS = re.compile(r"^(?:\s*<\|python_(?:tag|start|end)\|>)+")
MISTRAL_THOUGHTS = re.compile(r"^\s*\[THINK\](.*?)\[/THINK\]", re.DOTALL)
MISTRAL_CALL = re.compile(r"\s*([^\s\[\]{}]+)\s*(?:\[CALL_ID\]([^\[\]{}]*))?(?:\[ARGS\])?\s*(\{.*)", re.DOTALL)


def _mark(name: str) -> str:
    """A special token of DeepSeek's, with the full-width bars of those."""
    return f"<\uff5ctool▁{name}\uff5c>"


DEEPSEEK_CALLS = re.compile(rf"\s*{_mark('calls▁begin')}(.*?)(?:{_mark('calls▁end')}|\Z)", re.DOTALL)
DEEPSEEK_CALL = re.compile(rf"{_mark('call▁begin')}(.*?){_mark('sep')}(.*?)(?:{_mark('call▁end')}|\Z)", re.DOTALL)
FENCED = re.compile(r"\s*(\S+)\s*```(?:json)?(.*?)(?:```\s*)?", re.DOTALL)


def split_thoughts(text: str) -> tuple[str, str]:
    """What stands between the tags of thoughts, the opening one of which may be in the prompt, and the rest."""
    found = THOUGHTS.match(text)
    if found is None:
        return "", text
    return found[0].removesuffix("</think>").strip().removeprefix("<think>").strip(), text[found.end() :]


def read_hermes(text: str, tools: Sequence[Json]) -> Said:
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them: Hermes, Qwen 2.5 and Qwen 3."""
    thoughts, said = split_thoughts(text)
    calls = tuple(read_call(found[1]) for found in HERMES.finditer(said))
    return Said(text=HERMES.sub("", said).strip(), calls=calls, thoughts=thoughts)


def read_llama(text: str, tools: Sequence[Json]) -> Said:
    """`{"name": ..., "parameters": {...}}` as the whole turn: Llama 3.1 and later."""
    content = LLAMA_MARKS.sub("", text).strip()
    if not content.startswith("{") or re.search(r'"name"\s*:', content) is None:
        return Said(text=text)
    return Said(text="", calls=(read_call(content, ("parameters", "arguments")),))


def read_mistral(text: str, tools: Sequence[Json]) -> Said:
    """`[TOOL_CALLS]name[ARGS]{...}` for each call, also with `[CALL_ID]id` after the name (tokenizers of version 11 and
    later), or one `[TOOL_CALLS] [{"name": ..., "arguments": {...}, "id": ...}, ...]` (earlier ones)."""
    thoughts = found[1].strip() if (found := MISTRAL_THOUGHTS.match(text)) else ""
    said, *written = (text[found.end() :] if found else text).split("[TOOL_CALLS]")
    calls = tuple(call for one in written for call in _mistral_calls(one.strip()))
    return Said(text=said.strip() if calls else said, calls=calls, thoughts=thoughts)


def _mistral_calls(written: str) -> list[Call | UnreadCall]:
    if written.startswith("["):
        try:
            listed = json.loads(written)
        except (ValueError, RecursionError) as error:
            return [UnreadCall(why=f"the calls are no JSON ({str(error)[:100]})")]
        return [call_of(one) for one in listed] or [UnreadCall(why="the list of calls is empty")]
    if (found := MISTRAL_CALL.fullmatch(written)) is None:
        return [UnreadCall(why="the call is no name with a JSON object")]
    return [named_call(found[1], found[3], (found[2] or "").strip())]


def read_deepseek(text: str, tools: Sequence[Json]) -> Said:
    """Calls between marks: name, separator and JSON (DeepSeek V3.1 and later), or the word function, separator and name
    with JSON in a fence (V3, R1)."""
    thoughts, said = split_thoughts(text)
    calls = [_deepseek_call(*one) for block in DEEPSEEK_CALLS.findall(said) for one in DEEPSEEK_CALL.findall(block)]
    return Said(text=DEEPSEEK_CALLS.sub("", said) if calls else said, calls=tuple(calls), thoughts=thoughts)


def _deepseek_call(first: str, second: str) -> Call | UnreadCall:
    if (found := FENCED.fullmatch(second)) is not None:
        return named_call(found[1], found[2].strip())
    return named_call(first.strip(), second.strip())
