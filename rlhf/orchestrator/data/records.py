"""A row read as what it means: a prompt and responses to it, as text or as messages, before any tokenizer is seen."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TypeAlias

from rlhf.conversations.messages import MessageError, parse_tools
from rlhf.orchestrator.data.columns import Columns
from rlhf.orchestrator.data.dialogue import (
    check_prompt,
    is_dialogue,
    messages_of_dialogue,
    parse_messages,
    parse_text,
    shared_prompt,
    shared_words,
)
from rlhf.orchestrator.data.files import Row
from rlhf.orchestrator.data.problems import RowError
from rlhf.orchestrator.data.values import canonical_text, parse_json
from rlhf.types import Json, Message

MESSAGES = re.compile(r"""\s*\[\s*\{\s*(?P<quote>["'])(role|from|content|value)(?P=quote)\s*:""")
"""How a list of messages begins that was written into a text."""
FLOAT = re.compile(r"-?[0-9]+\.[0-9]+")
Text: TypeAlias = str | tuple[Message, ...]

TOOLS = "tools"
"""The column of the tools that a conversation may call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A prompt and responses to it, best first. Either all are text or all are messages.

    `names` are the columns of the prompt and of each response. `dialogue` says that the texts are parts of a
    Human/Assistant dialogue. `margins` are of the first response over each later one. With `steps`, the one response is
    these joined, and `step_labels` say how good each is, from 0 to 1.
    """

    row: Row
    prompt: Text
    responses: tuple[Text, ...] = ()
    names: tuple[str, ...] = ("prompt",)
    dialogue: bool = False
    margins: tuple[float, ...] = ()
    desirable: bool | None = None
    steps: tuple[str, ...] = ()
    step_labels: tuple[float, ...] = ()
    id: str = ""
    label: str | None = None
    metadata: Mapping[str, Json] = field(default_factory=dict)
    tools: tuple[Json, ...] = ()
    """What the column `tools` offers, for the chat template."""


def with_float_labels(rows: Sequence[Row], name: str | None) -> list[Row]:
    """The rows, with labels as numbers where those of CSV files are all floats as Python prints them: what whole
    numbers become in a table with gaps. CSV has no types: `2.0` of such a column is the float of any other format."""
    texts = [row.values.get(name) for row in rows if _is_csv(row.file)] if name is not None else []
    given = [text for text in texts if text != ""]
    if name is None or not given or not all(isinstance(text, str) and _is_printed_float(text) for text in given):
        return list(rows)
    return [
        replace(row, values={**row.values, name: float(str(row.values[name]))})
        if _is_csv(row.file) and row.values.get(name)
        else row
        for row in rows
    ]


def _is_csv(file: str) -> bool:
    return file.removesuffix(".gz").lower().endswith(".csv")


def _is_printed_float(text: str) -> bool:
    return FLOAT.fullmatch(text) is not None and repr(float(text)) == text


def complete(record: Record, columns: Columns) -> Record:
    """The record with its row's id, label and metadata."""
    values = record.row.values
    row_id = values.get(columns.id) if columns.id else None
    label = values.get(columns.label) if columns.label else None
    metadata = {name: value for name, value in values.items() if name not in columns.texts}
    return replace(
        record,
        id=canonical_text(row_id) or record.row.where,
        label=canonical_text(label),
        metadata=metadata,
        tools=_tools(record, values.get(TOOLS)),
    )


def given_messages(value: Json, name: str) -> Json:
    """The value of column `name`; a text that is a JSON list of messages, as tools write them into text columns, as
    this list. Raises RowError for such a list in Python's notation."""
    if not isinstance(value, str) or (start := MESSAGES.match(value)) is None:
        return value
    if start["quote"] == "'":
        if value.rstrip().endswith("]"):
            raise RowError(f"{name} is text that holds messages in Python's notation; write them as JSON.")
        return value
    try:
        parsed = parse_json(value)
    except ValueError:
        return value
    return parsed if isinstance(parsed, list) and all(isinstance(item, dict) for item in parsed) else value


def with_system(record: Record, columns: Columns) -> Record:
    """The record with the row's system message before its prompt, as messages. Raises RowError."""
    value = record.row.values.get(columns.system) if columns.system else None
    usable = isinstance(value, str) or columns.system_given
    if columns.system is None or value is None or value == "" or not usable or not record.prompt:
        return record
    system = Message(role="system", content=parse_text(value, columns.system))
    chat = as_chat(record)
    assert not isinstance(chat.prompt, str), "as_chat makes messages"
    first = chat.prompt[0]
    if first.role != "system":
        return replace(chat, prompt=(system, *chat.prompt))
    if first.content.strip() != system.content.strip():
        raise RowError(f"{columns.system} is not the system message of {record.names[0]}; leave one of them out.")
    return record


def _tools(record: Record, value: Json) -> tuple[Json, ...]:
    """The tools that messages are rendered with. Beside texts, any column may have that name."""
    try:
        return parse_tools(value, TOOLS)
    except MessageError as error:
        if isinstance(record.prompt, str):
            return ()
        raise RowError(str(error)) from error


def prompt_or_conversation(row: Row, columns: Columns) -> Text:
    """What the prompt's column holds: a prompt, or a whole conversation. Raises RowError."""
    assert columns.prompt is not None, "the caller saw to it"
    value = given_messages(row.values.get(columns.prompt), columns.prompt)
    if isinstance(value, list):
        return parse_messages(value, columns.prompt)
    text = parse_text(value, columns.prompt)
    extra = row.values.get("input")
    if columns.prompt == "instruction" and isinstance(extra, str) and extra.strip():
        return f"{text}\n\n{parse_text(extra, 'input')}"
    return text


def parse_prompt(row: Row, columns: Columns) -> Text:
    """The prompt, which must end where the assistant speaks next. Raises RowError."""
    assert columns.prompt is not None, "the caller saw to it"
    prompt = prompt_or_conversation(row, columns)
    if not isinstance(prompt, str):
        check_prompt(prompt, columns.prompt)
    return prompt


def parse_response(value: Json, name: str) -> Text:
    """A response, text or messages. Raises RowError."""
    value = given_messages(value, name)
    return parse_messages(value, name) if isinstance(value, list) else parse_text(value, name)


def parse_pair(row: Row, columns: Columns, name: str) -> Record:
    """A prompt and the response of the column `name`. Raises RowError."""
    assert columns.prompt is not None, "the caller saw to it"
    prompt = parse_prompt(row, columns)
    response = parse_response(row.values.get(name), name)
    return aligned(Record(row=row, prompt=prompt, responses=(response,), names=(columns.prompt, name)))


def parse_dialogues(row: Row, names: Sequence[str]) -> Record:
    """Responses given as whole dialogues: the prompt is what they have in common."""
    wholes = [parse_response(row.values.get(name), name) for name in names]
    texts = [whole for whole in wholes if isinstance(whole, str)]
    if len(texts) == len(wholes):
        dialogue = any(map(is_dialogue, texts)) or not _is_all_text(row, names)
        shared_text = shared_prompt(texts) if dialogue else shared_words(texts)
        return replace(continued(row, shared_text, texts, names), dialogue=dialogue)
    if texts:
        raise RowError(f"{' and '.join(names)} are of different kinds (text and messages).")
    lists = [whole for whole in wholes if not isinstance(whole, str)]
    shared = [turns[0] for turns in takewhile(lambda turns: len(set(turns)) == 1, zip(*lists, strict=False))]
    while shared and (shared[-1].role not in ("user", "tool") or any(len(turns) == len(shared) for turns in lists)):
        shared.pop()
    if not shared:
        raise RowError(f"{' and '.join(names)} share no first turns, and there is no prompt column.")
    prompt = tuple(shared)
    check_prompt(prompt, names[0])
    responses = tuple(turns[len(prompt) :] for turns in lists)
    return aligned(Record(row=row, prompt=prompt, responses=responses, names=("prompt", *names)))


def _is_all_text(row: Row, names: Sequence[str]) -> bool:
    """Whether two or more responses are all the text there is, so that no other column can be the prompt."""
    others = [value for name, value in row.values.items() if name not in (*names, "id")]
    return len(names) > 1 and not any(isinstance(value, str | list | dict) for value in others)


def continued(row: Row, prompt: str, dialogues: Sequence[str], names: Sequence[str]) -> Record:
    """Dialogues as text that begin with `prompt`; the rest of each is a response. Raises RowError."""
    responses = tuple(text[len(prompt) :] for text in dialogues)
    for response, name in zip(responses, names, strict=True):
        if not response.strip():
            raise RowError(f"the response of {name} is empty.")
    return Record(row=row, prompt=prompt, responses=responses, names=("prompt", *names), dialogue=True)


def aligned(record: Record) -> Record:
    """The prompt and its responses as one kind of thing, each response ending in an assistant's turn."""
    kinds = {isinstance(text, str) for text in (record.prompt, *record.responses)}
    if len(kinds) == 1 and isinstance(record.prompt, str):
        return record
    aligned = replace(
        record, prompt=as_messages(record.prompt, "user"), responses=tuple(map(as_messages, record.responses))
    )
    for response, name in zip(aligned.responses, record.names[1:], strict=True):
        last = response[-1]
        if isinstance(last, str) or last.role != "assistant":
            raise RowError(f"{name}: last message must be from assistant.")
    return aligned


def as_messages(text: Text, role: str = "assistant") -> tuple[Message, ...]:
    """A text as one message of `role`; messages as they are."""
    return (Message(role=role, content=text),) if isinstance(text, str) else text


def as_chat(record: Record) -> Record:
    """The record as messages: a dialogue by its turns, any other text as one turn."""
    if not isinstance(record.prompt, str):
        return record
    if not record.dialogue:
        responses = tuple(as_messages(response) for response in record.responses)
        return replace(record, prompt=as_messages(record.prompt, "user"), responses=responses)
    prompt = messages_of_dialogue(record.prompt)
    wholes = [messages_of_dialogue(record.prompt + str(response)) for response in record.responses]
    return aligned(replace(record, prompt=prompt, responses=tuple(turns[len(prompt) :] for turns in wholes)))


def as_plain(record: Record) -> Record:
    """The record as text: the contents of a prompt's messages a line each, and of a response's one message."""
    if isinstance(record.prompt, str):
        return record
    for response, name in zip(record.responses, record.names[1:], strict=True):
        if len(response) != 1:
            raise RowError(f"{name} has several turns, which need data.template=chat.")
    return replace(
        record,
        prompt="\n".join(message.content for message in record.prompt),
        responses=tuple(turn.content for response in record.responses for turn in as_messages(response)),
    )
