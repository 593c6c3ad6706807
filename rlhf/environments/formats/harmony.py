"""Turns of gpt-oss: messages in channels, of which one may be a call.

Source: OpenAI, "OpenAI Harmony Response Format".
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from rlhf.environments.calls import Call, Said, UnreadCall, apart, named_call
from rlhf.types import Json, Message

MESSAGE = re.compile(r"(.*?)<\|message\|>(.*?)(?:<\|(?:end|call|return)\|>|\Z)", re.DOTALL)
CHANNEL = re.compile(r"<\|channel\|>\s*([a-z]+)")
RECIPIENT = re.compile(r"\bto=(?:functions\.)?([^\s<]+)")
MARK = re.compile(r"<\|[a-z]+\|>")
THOUGHTS = "analysis"


def read_harmony(text: str, tools: Sequence[Json]) -> Said:
    """`<|channel|>CHANNEL<|message|>TEXT<|end|><|start|>assistant...`: thoughts in the channel analysis, calls to a
    recipient (`to=functions.name`) with JSON as the text, what is said in other channels."""
    calls: list[Call | UnreadCall] = []
    thoughts: list[str] = []
    said: list[str] = []
    for one in text.split("<|start|>"):
        if (found := MESSAGE.match(one)) is None:
            said += [MARK.sub("", one)] if one.strip() else []
            continue
        header, content = found[1], found[2]
        if recipient := RECIPIENT.search(header):
            calls.append(named_call(recipient[1], content))
            continue
        channel = CHANNEL.search(header)
        (thoughts if channel and channel[1] == THOUGHTS else said).append(MARK.sub("", content))
    return Said(text="\n".join(said), calls=tuple(calls), thoughts="\n".join(thoughts))


def harmony_message(said: Said, content: str) -> Message:
    """The turn for the chat template, which takes either thoughts or a text beside a call."""
    return apart(replace(said, text="") if said.calls and said.thoughts else said, content)
