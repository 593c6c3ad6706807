"""A row read as what it means: a prompt and responses to it, as text or as messages, before any tokenizer is seen."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import TypeAlias

from rlhf.config.data import RowKind
from rlhf.orchestrator.data.columns import Columns
from rlhf.orchestrator.data.dialogue import (
    check_prompt,
    first_prompt,
    is_dialogue,
    messages_of_dialogue,
    parse_messages,
    parse_text,
    shared_prompt,
    shared_words,
)
from rlhf.orchestrator.data.files import Row
from rlhf.orchestrator.data.problems import RowError
from rlhf.types import Json, Message

Text: TypeAlias = str | tuple[Message, ...]


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


def read_record(row: Row, columns: Columns, kind: RowKind) -> Record:
    """What a row means. Raises RowError where it means nothing."""
    record = PARSERS[kind](row, columns)
    values = row.values
    row_id = values.get(columns.id) if columns.id else None
    label = values.get(columns.label) if columns.label else None
    metadata = {name: value for name, value in values.items() if name not in columns.texts}
    return replace(
        record,
        id=row.where if row_id is None else str(row_id),
        label=label if label is None or isinstance(label, str) else json.dumps(label),
        metadata=metadata,
    )


def _prompt(row: Row, columns: Columns) -> Text:
    assert columns.prompt is not None, "find_columns saw to it"
    value = row.values.get(columns.prompt)
    if isinstance(value, list):
        return parse_messages(value, columns.prompt)
    text = parse_text(value, columns.prompt)
    extra = row.values.get("input")
    if columns.prompt == "instruction" and isinstance(extra, str) and extra.strip():
        return f"{text}\n\n{parse_text(extra, 'input')}"
    return text


def _response(value: Json, name: str) -> Text:
    return parse_messages(value, name) if isinstance(value, list) else parse_text(value, name)


def _prompts(row: Row, columns: Columns) -> Record:
    if columns.prompt is None:
        names = [name for name in (columns.chosen, columns.rejected) if name is not None]
        return replace(_dialogues(row, names), responses=(), names=("prompt",))
    prompt = _prompt(row, columns)
    if not isinstance(prompt, str):
        check_prompt(prompt, columns.prompt)
    return Record(row=row, prompt=prompt, names=(columns.prompt,))


def _demonstrations(row: Row, columns: Columns) -> Record:
    if columns.prompt is None:
        assert columns.chosen is not None, "find_columns saw to it"
        response = _response(row.values.get(columns.chosen), columns.chosen)
        if not isinstance(response, str):
            return _conversation(row, response, columns.chosen)
        if not is_dialogue(response):
            raise RowError(
                f"{columns.chosen} is no dialogue (Human: ... Assistant: ...), and there is no prompt column."
            )
        prompt = first_prompt(response)
        return _continued(row, prompt, [response], [columns.chosen])
    prompt_or_all = _prompt(row, columns)
    name = columns.response or columns.chosen
    whole = not isinstance(prompt_or_all, str) and prompt_or_all[-1].role == "assistant" and not columns.response_given
    if name is None or whole:
        if isinstance(prompt_or_all, str):
            raise RowError("no response (no response column); set data.response_key.")
        return _conversation(row, prompt_or_all, columns.prompt)
    return _pairless(row, columns, name)


def _pairless(row: Row, columns: Columns, name: str) -> Record:
    assert columns.prompt is not None, "the caller saw to it"
    prompt = _prompts(row, columns).prompt
    response = _response(row.values.get(name), name)
    return _aligned(Record(row=row, prompt=prompt, responses=(response,), names=(columns.prompt, name)))


def _labeled(row: Row, columns: Columns) -> Record:
    if columns.pairs_as_labels:
        return _preferences(row, columns)
    assert columns.response is not None, "find_columns saw to it"
    assert columns.label is not None, "find_columns saw to it"
    value = row.values.get(columns.label)
    text = str(value).lower()
    if text not in ("true", "false") or not isinstance(value, bool | str):
        raise RowError(f"{columns.label} must be true or false (got {json.dumps(value, ensure_ascii=False)}).")
    return replace(_pairless(row, columns, columns.response), desirable=text == "true")


def _preferences(row: Row, columns: Columns) -> Record:
    if columns.chosen is None or columns.rejected is None:
        return _ranking(row, columns)
    names = [columns.chosen, columns.rejected]
    if row.values.get(columns.chosen) == row.values.get(columns.rejected) is not None:
        raise RowError(f"{columns.chosen} and {columns.rejected} are the same.")
    responses = tuple(_response(row.values.get(name), name) for name in names)
    whole = any(not isinstance(response, str) and response[0].role != "assistant" for response in responses)
    if columns.prompt is None or whole:
        record = _dialogues(row, names)
    else:
        prompt = _prompts(row, columns).prompt
        record = _aligned(Record(row=row, prompt=prompt, responses=responses, names=(columns.prompt, *names)))
    return replace(record, margins=_margins(row, columns, len(responses)))


def _ranking(row: Row, columns: Columns) -> Record:
    assert columns.ranking is not None, "find_columns saw to it"
    assert columns.prompt is not None, "find_columns saw to it"
    values = row.values.get(columns.ranking)
    if not isinstance(values, list) or len(values) < 2:
        raise RowError(f"{columns.ranking} is not a list of two responses or more.")
    names = [f"{columns.ranking}[{index}]" for index in range(len(values))]
    responses = [_response(value, name) for value, name in zip(values, names, strict=True)]
    for index, response in enumerate(responses):
        if response in responses[:index]:
            raise RowError(f"{names[responses.index(response)]} and {names[index]} are the same.")
    prompt = _prompts(row, columns).prompt
    record = Record(row=row, prompt=prompt, responses=tuple(responses), names=(columns.prompt, *names))
    return replace(_aligned(record), margins=_margins(row, columns, len(responses)))


def _steps(row: Row, columns: Columns) -> Record:
    assert columns.prompt is not None, "find_columns saw to it"
    assert columns.response is not None, "find_columns saw to it"
    assert columns.label is not None, "find_columns saw to it"
    given, labels = row.values.get(columns.response), row.values.get(columns.label)
    if not isinstance(given, list) or not given:
        raise RowError(f"{columns.response} is not a list of steps.")
    if not isinstance(labels, list) or len(labels) != len(given):
        got = len(labels) if isinstance(labels, list) else "no list of"
        raise RowError(f"{columns.label}: {got} labels for {len(given)} steps.")
    steps = tuple(parse_text(step, f"{columns.response}[{index}]") for index, step in enumerate(given))
    return replace(
        _prompts(row, columns),
        steps=steps,
        step_labels=tuple(_step_label(label, f"{columns.label}[{index}]") for index, label in enumerate(labels)),
    )


def _step_label(value: Json, name: str) -> float:
    """How good a step is: true, "+" or 1 is good; false, "-" or 0 is bad; a share of good ends is between."""
    if value in ("+", "-"):
        return float(value == "+")
    if isinstance(value, str) or not isinstance(value, bool | int | float) or not 0.0 <= value <= 1.0:
        raise RowError(f"{name} must be true, false or from 0 to 1 (got {json.dumps(value, ensure_ascii=False)}).")
    return float(value)


def _texts(row: Row, columns: Columns) -> Record:
    if columns.text is None:
        return _demonstrations(row, columns)
    text = parse_text(row.values.get(columns.text), columns.text)
    return Record(row=row, prompt="", responses=(text,), names=("prompt", columns.text))


PARSERS: dict[RowKind, Callable[[Row, Columns], Record]] = {
    RowKind.PROMPTS: _prompts,
    RowKind.DEMONSTRATIONS: _demonstrations,
    RowKind.PREFERENCES: _preferences,
    RowKind.LABELED: _labeled,
    RowKind.STEPS: _steps,
    RowKind.TEXTS: _texts,
}


def _margins(row: Row, columns: Columns, num_responses: int) -> tuple[float, ...]:
    value = row.values.get(columns.margin) if columns.margin else None
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    try:
        margins = tuple(math.nan if isinstance(item, bool) else float(item) for item in values)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        margins = (math.nan,)
    if not all(map(math.isfinite, margins)):
        raise RowError(f"{columns.margin} must be a finite number (got {json.dumps(value, ensure_ascii=False)}).")
    if len(margins) != num_responses - 1:
        raise RowError(f"{columns.margin} holds {len(margins)} numbers, need {num_responses - 1}.")
    return margins


def _conversation(row: Row, messages: tuple[Message, ...], name: str) -> Record:
    """A demonstration given whole: the prompt is what stands before the assistant's first turn."""
    if messages[-1].role != "assistant":
        raise RowError("last message must be from assistant.")
    prompt = tuple(takewhile(lambda message: message.role != "assistant", messages))
    if not prompt:
        raise RowError(f"{name} begins with the assistant.")
    check_prompt(prompt, name)
    return Record(row=row, prompt=prompt, responses=(messages[len(prompt) :],), names=(name, name))


def _dialogues(row: Row, names: Sequence[str]) -> Record:
    """Responses given as whole dialogues: the prompt is what they have in common."""
    wholes = [_response(row.values.get(name), name) for name in names]
    texts = [whole for whole in wholes if isinstance(whole, str)]
    if len(texts) == len(wholes):
        dialogue = any(map(is_dialogue, texts)) or not _is_all_text(row, names)
        shared_text = shared_prompt(texts) if dialogue else shared_words(texts)
        return replace(_continued(row, shared_text, texts, names), dialogue=dialogue)
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
    return _aligned(Record(row=row, prompt=prompt, responses=responses, names=("prompt", *names)))


def _is_all_text(row: Row, names: Sequence[str]) -> bool:
    """Whether two or more responses are all the text there is, so that no other column can be the prompt."""
    others = [value for name, value in row.values.items() if name not in (*names, "id")]
    return len(names) > 1 and not any(isinstance(value, str | list | dict) for value in others)


def _continued(row: Row, prompt: str, dialogues: Sequence[str], names: Sequence[str]) -> Record:
    responses = tuple(text[len(prompt) :] for text in dialogues)
    for response, name in zip(responses, names, strict=True):
        if not response.strip():
            raise RowError(f"the response of {name} is empty.")
    return Record(row=row, prompt=prompt, responses=responses, names=("prompt", *names), dialogue=True)


def _aligned(record: Record) -> Record:
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
    return _aligned(replace(record, prompt=prompt, responses=tuple(turns[len(prompt) :] for turns in wholes)))


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
