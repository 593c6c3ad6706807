"""What each turn of a conversation adds to the text that a chat template makes of it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from rlhf.conversations.lost import CLOSING, Lost, lost_messages
from rlhf.conversations.messages import REASONING
from rlhf.types import Message

Render: TypeAlias = Callable[[Sequence[Message], bool], str]
"""Messages, and whether an assistant's answer is to follow -> text."""

OPENED = re.compile(r"<(think|thinking|thought|reasoning)>\s*$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A stretch of a response's text, and whether the assistant wrote it."""

    text: str
    written: bool


class RewrittenError(ValueError):
    """A template writes earlier turns in another way once later ones follow."""


class LeftOutError(ValueError):
    """A template leaves out part of a turn that is learned, or that the assistant must see."""


def turn_parts(render: Render, prompt: Sequence[Message], response: Sequence[Message]) -> list[Part]:
    """What each turn of `response` adds to the text of `prompt`. Joined, the parts are what generation would have seen
    and written, turn by turn.

    Raises RewrittenError where the template changes earlier turns, LeftOutError where it does not show a turn whole.
    """
    turns = list(prompt)
    shown = render(turns, True)
    parts: list[Part] = []
    others: list[Message] = []
    for turn in response:
        if turn.role != "assistant":
            turns.append(turn)
            others.append(turn)
            continue
        before = render(turns, True)
        if not before.startswith(shown):
            raise RewrittenError(f"the chat template rewrites what stands before messages[{len(turns) - 1}].")
        if len(before) > len(shown):
            parts.append(Part(text=before[len(shown) :], written=False))
        if lost := lost_messages(others, before[len(shown) :]):
            raise LeftOutError(left_out(lost, len(turns) - len(others)))
        text = answer_text(render, turns, turn, before)
        parts.append(Part(text=text, written=True))
        turns.append(turn)
        others = []
        shown = before + text
    return parts


def answer_text(render: Render, turns: Sequence[Message], answer: Message, before: str) -> str:
    """What an assistant writes after `before`, which the template made of `turns`. Raises as `turn_parts`."""
    whole = render([*turns, answer], False)
    if whole.startswith(before):
        text = whole[len(before) :]
    elif (opened := OPENED.search(before)) and whole.startswith(before[: opened.start()]):
        text = _with_thoughts(whole[opened.start() :], answer, opened[1], len(turns))
    else:
        raise RewrittenError(f"the chat template rewrites what stands before messages[{len(turns)}].")
    if lost := lost_messages([answer], text):
        raise LeftOutError(left_out(lost, len(turns)))
    return text


def left_out(lost: Sequence[Lost], first: int) -> str:
    """Say what is lost of the messages that begin at number `first`."""
    names = dict.fromkeys(f"messages[{first + one.index}] (its {one.what})" for one in lost)
    return f"the chat template leaves out part of {', '.join(names)}."


def _with_thoughts(shown: str, answer: Message, tag: str, index: int) -> str:
    """An answer after a prompt that has opened the assistant's thoughts, of which the template shows at most the rest:
    the thoughts as they are, up to the closing tag, then what the template shows."""
    content = answer.content
    if REASONING[0] in answer.fields:
        thoughts, said = f"{str(answer.fields[REASONING[0]]).strip()}\n</{tag}>\n\n", content
    elif closings := list(CLOSING.finditer(content)):
        end = closings[-1].end()
        said = content[end:].lstrip()
        thoughts = re.sub(rf"^\s*<{tag}>\s*", "", content[: len(content) - len(said)])
    else:
        raise LeftOutError(
            f"the chat template opens the thoughts of messages[{index}], which has none; set data.chat_template."
        )
    rest = shown.partition(said.strip())[1:] if said.strip() else ("", shown.lstrip())
    return thoughts + "".join(rest)
