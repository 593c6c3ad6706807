"""Calls as Gemma 4 writes them: keys without quotes, texts between marks of their own."""

import json
import re
from collections.abc import Sequence

from rlhf.environments.calls import Call, Said, UnreadCall
from rlhf.types import Json

THOUGHTS = re.compile(r"<\|channel>thought\n(.*?)\n?<channel\|>", re.DOTALL)
CALL = re.compile(r"<\|tool_call>(.*?)(?:<tool_call\|>|\Z)", re.DOTALL)
NAMED = re.compile(r"\s*call:([^\s{]+)(\{.*\})\s*", re.DOTALL)
QUOTE = '<|"|>'
KEY = re.compile(r"([{,]\s*)([^\s{}\[\],:\"]+)(\s*:)")


def read_gemma(text: str, tools: Sequence[Json]) -> Said:
    """`<|tool_call>call:name{key:<|"|>text<|"|>,other:3}<tool_call|>`, any number of them."""
    thoughts = "\n".join(found[1] for found in THOUGHTS.finditer(text))
    said = THOUGHTS.sub("", text)
    calls = tuple(_call(found[1]) for found in CALL.finditer(said))
    return Said(text=CALL.sub("", said).strip() if calls else said, calls=calls, thoughts=thoughts)


def _call(written: str) -> Call | UnreadCall:
    if (found := NAMED.fullmatch(written)) is None:
        return UnreadCall(why="the call is not of the form call:name{key:value}")
    try:
        arguments = json.loads(_as_json(found[2]))
    except (ValueError, RecursionError) as error:
        return UnreadCall(why=f"the arguments of {found[1]} cannot be read ({str(error)[:100]})")
    return Call(name=found[1], arguments=arguments)


def _as_json(written: str) -> str:
    """The same value as JSON: what stands between marks is a text, and before a colon a key."""
    parts = written.split(QUOTE)
    return "".join(KEY.sub(r'\1"\2"\3', part) if n % 2 == 0 else json.dumps(part) for n, part in enumerate(parts))
