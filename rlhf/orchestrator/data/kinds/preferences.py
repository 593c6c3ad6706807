"""Prompts with a better and a worse response, or with a ranking of more."""

import math
from dataclasses import replace

from rlhf.orchestrator.data.columns import Columns
from rlhf.orchestrator.data.files import Row
from rlhf.orchestrator.data.kinds.base import PROMPT_NEEDED, OfflineRows
from rlhf.orchestrator.data.problems import RowError
from rlhf.orchestrator.data.records import Record, aligned, as_messages, parse_dialogues, parse_prompt, parse_response
from rlhf.orchestrator.data.values import shown


class Preferences(OfflineRows):
    """Two or more responses a prompt, best first."""

    holds = "prompts with a better and a worse response, or a ranking"

    def missing(self, columns: Columns) -> list[str]:
        responses = columns.is_pair or columns.ranking is not None
        prompt = columns.is_pair or columns.prompt is not None
        needs = [(responses, "chosen and rejected, nor ranking; set data.chosen_key"), (prompt, PROMPT_NEEDED)]
        return [what for met, what in needs if not met]

    def reads(self, columns: Columns) -> set[str | None]:
        return super().reads(columns) | {columns.margin}

    def parse(self, row: Row, columns: Columns) -> Record:
        return parse_preference(row, columns)


def parse_preference(row: Row, columns: Columns) -> Record:
    """A pair, or a ranking where no column holds the better or the worse response. Raises RowError."""
    if columns.chosen is None or columns.rejected is None:
        return _ranking(row, columns)
    names = [columns.chosen, columns.rejected]
    if row.values.get(columns.chosen) == row.values.get(columns.rejected) is not None:
        raise RowError(f"{columns.chosen} and {columns.rejected} are the same.")
    responses = tuple(parse_response(row.values.get(name), name) for name in names)
    whole = any(not isinstance(response, str) and response[0].role != "assistant" for response in responses)
    if columns.prompt is None or whole:
        record = parse_dialogues(row, names)
        record = replace(record, names=(_repeated_prompt(row, columns, record), *names))
    else:
        prompt = parse_prompt(row, columns)
        record = aligned(Record(row=row, prompt=prompt, responses=responses, names=(columns.prompt, *names)))
    return replace(record, margins=_margins(row, columns, len(responses)))


def _repeated_prompt(row: Row, columns: Columns, record: Record) -> str:
    """The column of the prompt where it says again what whole conversations begin with; else a name that no column
    has, since it is not read."""
    value = row.values.get(columns.prompt) if columns.prompt else None
    prompt = as_messages(record.prompt)
    same = isinstance(value, str) and any(value.strip() == turn.content.strip() for turn in prompt)
    same = same or (isinstance(value, list) and len(value) <= len(prompt))
    return columns.prompt if same and columns.prompt is not None else "the prompt"


def _ranking(row: Row, columns: Columns) -> Record:
    assert columns.ranking is not None, "it is a column that preferences need"
    assert columns.prompt is not None, "it is a column that rankings need"
    values = row.values.get(columns.ranking)
    if not isinstance(values, list) or len(values) < 2:
        raise RowError(f"{columns.ranking} is not a list of two responses or more.")
    names = [f"{columns.ranking}[{index}]" for index in range(len(values))]
    responses = [parse_response(value, name) for value, name in zip(values, names, strict=True)]
    for index, response in enumerate(responses):
        if response in responses[:index]:
            raise RowError(f"{names[responses.index(response)]} and {names[index]} are the same.")
    prompt = parse_prompt(row, columns)
    record = Record(row=row, prompt=prompt, responses=tuple(responses), names=(columns.prompt, *names))
    return replace(aligned(record), margins=_margins(row, columns, len(responses)))


def _margins(row: Row, columns: Columns, num_responses: int) -> tuple[float, ...]:
    """How much better the first response is than each later one; none where the row does not say."""
    value = row.values.get(columns.margin) if columns.margin else None
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    try:
        margins = tuple(math.nan if isinstance(item, bool) else float(item) for item in values)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        margins = (math.nan,)
    if not all(map(math.isfinite, margins)):
        raise RowError(f"{columns.margin} must be a finite number (got {shown(value)}).")
    if len(margins) != num_responses - 1:
        raise RowError(f"{columns.margin} holds {len(margins)} numbers, need {num_responses - 1}.")
    return margins
