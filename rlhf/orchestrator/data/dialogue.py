"""Conversations: as lists of messages, and as text in the form "\\n\\nHuman: ... \\n\\nAssistant: ..."."""

import os
import re
from collections.abc import Sequence

from rlhf.orchestrator.data.problems import RowError
from rlhf.types import Json, Message

ASSISTANT = "\n\nAssistant:"
TURN = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"system", "user", "assistant", "tool"}
OTHER_NAMES = {"human": "user", "gpt": "assistant", "developer": "system"}


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
    """A list of {role, content} (or {from, value}) objects. Raises RowError naming the bad one."""
    if not isinstance(value, list) or not value:
        raise RowError(f"{column} is empty." if value in (None, []) else f"{column} is not a list of messages.")
    return tuple(_parse_message(item, f"{column}[{index}]") for index, item in enumerate(value))


def _parse_message(item: Json, where: str) -> Message:
    if not isinstance(item, dict):
        raise RowError(f"{where} is not a message (got {type(item).__name__}).")
    role = item.get("role", item.get("from"))
    if not isinstance(role, str) or OTHER_NAMES.get(role, role) not in ROLES:
        raise RowError(f'{where}.role "{role}" unknown.')
    content = item.get("content", item.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise RowError(f"{where}.content holds parts that are not text.")
        content = "".join(str(part) for part in parts)
    return Message(role=OTHER_NAMES.get(role, role), content=parse_text(content, f"{where}.content"))


def parse_text(value: Json, column: str) -> str:
    """A text that is not blank and that a tokenizer can take."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowError(f"{column} is empty.")
    if not isinstance(value, str):
        raise RowError(f"{column} is not text (got {type(value).__name__}).")
    if "\x00" in value:
        raise RowError(f"{column} holds a NUL byte.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{column} holds a lone surrogate at character {error.start}.") from error
    return value


def check_prompt(messages: Sequence[Message], column: str) -> None:
    """What is answered must hold a user turn and end where the assistant speaks next."""
    if not any(message.role == "user" for message in messages):
        raise RowError(f"{column} has no user turn.")
    if messages[-1].role not in ("user", "tool"):
        raise RowError("last message must be from user.")
