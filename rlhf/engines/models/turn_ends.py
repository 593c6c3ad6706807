"""Special tokens by what a tokenizer does: which texts become one, and which of them end an assistant's turn."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rlhf.conversations.lost import TAG
from rlhf.engines.models.plain_tokenizer import FastTokenizer
from rlhf.errors import DataError, ModelError
from rlhf.types import Json

Turn: TypeAlias = dict[str, Json]
Render: TypeAlias = Callable[[Sequence[Turn]], str]
"""Applies the chat template, without a generation prompt. Raises DataError or ModelError."""

SENTINEL = "sentinel"
"""A text that shows where a chat template puts what the assistant says."""
FIRST = "firstcall"
"""The same of the first of two calls."""


def special_texts(tokenizer: FastTokenizer) -> tuple[str, ...]:
    """The texts that the tokenizer encodes as one special token, whichever of its files says so."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    own = [token.content for token in added if token.special and token.content]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *own]))


def turn_ends(render: Render, tokenizer: FastTokenizer) -> list[int]:
    """The tokens that end an assistant's turn in what the chat template makes of an answer and of calls of a tool.

    An answer's end is the last token that follows it both at the end of a conversation and before another turn. The end
    of calls is the last token after them that does not also stand between two of them. Where a template ends a turn
    with the beginning of the next one, that is the end.
    """
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    marks = {number for number, token in added.items() if token.content.strip()}

    def among(text: str, tokens: Collection[int]) -> list[int]:
        ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return [token for token in ids if token in tokens]

    ends: list[int] = []
    if answer := _first_shown(render, _answers()):
        shared = os.path.commonprefix([answer.last, answer.middle])  # noqa: RUF071 characters are what is meant
        ends += (
            among(shared, special)[-1:]
            or among(shared, marks)[-1:]
            or among(answer.last, special)[:1]
            or among(answer.middle, special)[:1]
        )
    if calls := _first_shown(render, _calls()):
        outside = special - set(among(calls.between, special))
        ends += among(calls.last, outside)[-1:] or among(calls.middle, outside)[:1]
    return ends


def turn_marks(render: Render, tokenizer: FastTokenizer) -> list[str]:
    """The added tokens that the chat template writes around a question and an answer, special or not: in a text they
    would begin another turn. Tags of thoughts are no marks of turns."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    found: dict[str, None] = {}
    for turns, then in _answers():
        ids = tokenizer.backend_tokenizer.encode(_rendered(render, [*turns, then]), add_special_tokens=False).ids
        found |= dict.fromkeys(added[number].content for number in ids if number in added)
    return [text for text in found if text.strip() and TAG.fullmatch(text.strip()) is None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a template writes after the sentinel: at the `last` place of a conversation, in the `middle`, before another
    turn, and `between` two calls."""

    last: str
    middle: str
    between: str


def _first_shown(render: Render, forms: Iterator[tuple[list[Turn], Turn]]) -> Shown | None:
    """What the template writes around the first form of a turn that it shows; None: it shows none."""
    for turns, then in forms:
        last = _rendered(render, turns)
        if SENTINEL not in last:
            continue
        before, _, after = last.rpartition(SENTINEL)
        between = before.rpartition(FIRST)[2] if FIRST in before else ""
        return Shown(last=after, middle=_rendered(render, [*turns, then]).rpartition(SENTINEL)[2], between=between)
    return None


def _rendered(render: Render, turns: Sequence[Turn]) -> str:
    try:
        return render(turns)
    except (DataError, ModelError):
        return ""


def _answers() -> Iterator[tuple[list[Turn], Turn]]:
    """An answer, with contents as texts and as lists of parts."""
    for content in (_as_text, _as_parts):
        hello: Turn = {"role": "user", "content": content("Hello")}
        yield [hello, {"role": "assistant", "content": content(SENTINEL)}], hello


def _calls() -> Iterator[tuple[list[Turn], Turn]]:
    """Two calls of a tool, or one, in the forms that templates want."""
    hello: Turn = {"role": "user", "content": "Hello"}
    reply: Turn = {"role": "tool", "tool_call_id": CALL_IDS[-1], "name": "lookup", "content": "found"}
    for texts in ((FIRST, SENTINEL), (SENTINEL,)):
        for as_object in (True, False):
            calls = [
                _call(number, text, as_object) for number, text in zip(CALL_IDS[-len(texts) :], texts, strict=True)
            ]
            for content in ("", None):
                yield [hello, {"role": "assistant", "content": content, "tool_calls": calls}], reply


def _call(number: str, text: str, as_object: bool) -> Json:
    arguments: Json = {"key": text} if as_object else f'{{"key": "{text}"}}'
    return {"id": number, "type": "function", "function": {"name": "lookup", "arguments": arguments}}


CALL_IDS = ("callid001", "callid002")
"""Nine letters and digits, as the strictest templates want them."""


def _as_text(text: str) -> Json:
    return text


def _as_parts(text: str) -> Json:
    return [{"type": "text", "text": text}]
