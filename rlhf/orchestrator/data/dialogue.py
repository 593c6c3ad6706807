"""Conversations: as lists of messages, and as text in the form "\\n\\nHuman: ... \\n\\nAssistant: ..."."""

import os
import re
from collections.abc import Sequence

from rlhf.conversations.messages import MessageError, checked_text, parse_message
from rlhf.orchestrator.data.problems import RowError
from rlhf.types import Json, Message

ASSISTANT = "\n\nAssistant:"
TURN = re.compile(r"\n\n(Human|Assistant):")


def is_dialogue(text: str) -> bool:
    """Whether a text is a whole dialogue in Human/Assistant form, and not a response."""
    return text.lstrip().startswith("Human:") and ASSISTANT in text


def shared_prompt(dialogues: Sequence[str]) -> str:
    """What dialogues have in common up to the last "Assistant:" before they part.

    With one dialogue: everything up to its last "Assistant:".
    """
    common = os.path.commonprefix(list(dialogues))  # noqa: RUF071 characters are what is meant
    end = common.rfind(ASSISTANT)
    if end < 0:
        raise RowError("the responses share no beginning that ends in Assistant:, and there is no prompt column.")
    return common[: end + len(ASSISTANT)]


def shared_words(texts: Sequence[str]) -> str:
    """The whole words that texts begin with in common; the space after them belongs to the rest, as tokenizers want."""
    common = os.path.commonprefix(list(texts))  # noqa: RUF071 characters are what is meant
    end = max((index for index, character in enumerate(common) if character.isspace()), default=0)
    if not common[:end].strip():
        raise RowError("the responses share no first words, and there is no prompt column.")
    return common[:end].rstrip()


def first_prompt(dialogue: str) -> str:
    """A dialogue up to its first "Assistant:"."""
    return dialogue[: dialogue.index(ASSISTANT) + len(ASSISTANT)]


def response_parts(response: str) -> list[tuple[str, bool]]:
    """The rest of a dialogue as (text, whether the assistant wrote it). Joined, the texts are the response."""
    parts: list[tuple[str, bool]] = []
    written, start = True, 0
    for turn in TURN.finditer(response):
        by_assistant = turn[1] == "Assistant"
        cut = turn.end() if by_assistant else turn.start()
        if cut > start:
            parts.append((response[start:cut], written))
        written, start = by_assistant, cut
    return [*parts, (response[start:], written)] if start < len(response) else parts


def messages_of_dialogue(text: str) -> tuple[Message, ...]:
    """A dialogue text as messages; an empty last turn (the open "Assistant:") is left out."""
    pieces = TURN.split("\n\n" + text.lstrip())
    names = {"Human": "user", "Assistant": "assistant"}
    turns = [(names[name], content.strip()) for name, content in zip(pieces[1::2], pieces[2::2], strict=True)]
    return tuple(Message(role=role, content=content) for role, content in turns if content)


def parse_messages(value: Json, column: str) -> tuple[Message, ...]:
    """A list of {role, content, ...} (or {from, value}) objects. Raises RowError naming the bad one."""
    if not isinstance(value, list) or not value:
        raise RowError(f"{column} is empty." if value in (None, []) else f"{column} is not a list of messages.")
    try:
        return tuple(parse_message(item, f"{column}[{index}]") for index, item in enumerate(value))
    except MessageError as error:
        raise RowError(str(error)) from error


def parse_text(value: Json, column: str) -> str:
    """A text that is not blank and that a tokenizer can take."""
    try:
        return checked_text(value, column)
    except MessageError as error:
        raise RowError(str(error)) from error


def check_prompt(messages: Sequence[Message], column: str) -> None:
    """What is answered must hold a user turn and end where the assistant speaks next."""
    if not any(message.role == "user" for message in messages):
        raise RowError(f"{column} has no user turn.")
    if messages[-1].role not in ("user", "tool"):
        raise RowError("last message must be from user.")
