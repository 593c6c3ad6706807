"""Data sets as the loop wants them: prompts for online training, scored groups for training on given responses."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rlhf.config.commands import RowKind
from rlhf.config.data import DataSection
from rlhf.engines.base import Tokenizer
from rlhf.errors import ConfigError, DataError, ModelError
from rlhf.orchestrator.data.columns import find_columns
from rlhf.orchestrator.data.encoding import Encoder, EpisodePrompts
from rlhf.orchestrator.data.kinds import OFFLINE_ROWS, ROWS
from rlhf.orchestrator.data.kinds.base import OVERLONG, LeftOutError
from rlhf.orchestrator.data.layout import Wanted, held_out_split, training_split
from rlhf.orchestrator.data.problems import Problems, RowError
from rlhf.orchestrator.data.progress import Progress
from rlhf.orchestrator.data.records import Record, complete, with_float_labels, with_system
from rlhf.orchestrator.data.sources import read_rows
from rlhf.orchestrator.data.split import (
    DataSplit,
    divide,
    fingerprint,
    group_content,
    held_out_keys,
    prompt_content,
    prompt_key,
)
from rlhf.orchestrator.data.unread import NONE_UNREAD, Unread, find_unread
from rlhf.terminal import counted
from rlhf.types import Prompt, ScoredGroup

T = TypeVar("T")

logger = logging.getLogger(__name__)

ALSO_HELD_OUT = "prompt also in eval_path"


def load_prompts(
    section: DataSection,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    max_rows: int | None = None,
    episodes: EpisodePrompts | None = None,
    *,
    by_columns: bool = False,
) -> DataSplit[Prompt]:
    """Prompts to be answered; with `max_rows` only so many, evenly spaced. `episodes`: how they are answered in several
    turns. `by_columns`: whether the task of a row depends on its other columns too, so that rows with the same prompt
    may be on both sides of the held-out split. Raises DataError with everything that is wrong with the rows."""
    encoder = Encoder(section, tokenizer, episodes)

    def make(record: Record) -> list[Prompt]:
        prompt = encoder.prompt(encoder.settle_kind(record))
        if len(prompt.token_ids) > max_prompt_tokens:
            raise LeftOutError(OVERLONG)
        return [prompt]

    def task(prompt: Prompt) -> str:
        columns = {name: value for name, value in prompt.metadata.items() if name != "messages"}  # the text has these
        return f"{prompt.text} {json.dumps(columns, sort_keys=True)}" if by_columns else prompt.text

    limit = f"prompts exceed {max_prompt_tokens} tokens"
    return _load(section, RowKind.PROMPTS, make, limit, task, prompt_content, encoder.notes, max_rows)


def load_groups(
    section: DataSection, tokenizer: Tokenizer, kind: RowKind, max_rows: int | None = None
) -> DataSplit[ScoredGroup]:
    """Prompts with given responses, read as rows of one kind; with `max_rows` only so many, evenly spaced. Raises
    DataError with everything that is wrong with the rows."""
    rows, encoder = OFFLINE_ROWS[kind], Encoder(section, tokenizer)

    def make(record: Record) -> list[ScoredGroup]:
        return rows.groups(section, encoder, record)

    limit = f"rows exceed {section.max_tokens} tokens (data.max_tokens)"
    split = _load(section, kind, make, limit, rows.split_text, group_content, encoder.notes, max_rows)
    if max_rows is None:  # a few rows may well have one label
        require_both_labels(split)
    return split


def require_both_labels(split: DataSplit[ScoredGroup]) -> None:
    """Raise DataError where the rows had both labels, and those that are left to train on have one."""
    labels = [label for group in split.train for label in group.labels]
    if len(set(labels)) == 1:
        held_out = [label for group in split.held_out for label in group.labels]
        raise DataError(
            f"data: both labels are needed; all {len(labels)} rows to train on are {str(labels[0]).lower()} (held out: "
            f"{held_out.count(not labels[0])} that are {str(not labels[0]).lower()}; dropped: {dict(split.dropped)}). "
            "Lower data.eval_fraction, choose another data.split_seed, or keep more rows."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRows:
    """The good rows of data.path and data.eval_path, which files and splits are not read, one line each, what is not
    read of the rows of either, and what is wrong with the others, one line each."""

    records: tuple[Record, ...]
    notes: tuple[str, ...]
    unread: tuple[Unread, ...]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """The good rows under a path, and what nothing reads of them."""

    records: Sequence[Record] = ()
    unread: Unread = NONE_UNREAD


def check_rows(section: DataSection, kind: RowKind) -> CheckedRows:
    """Everything that can be known about the rows without a tokenizer. Raises DataError."""
    rows = look_at_rows(section, kind)
    if rows.problems:
        raise DataError(rows.problems)
    return rows


def look_at_rows(section: DataSection, kind: RowKind) -> CheckedRows:
    """The same, with what is wrong in place of an error."""
    problems = Problems(section.max_bad_rows)
    sides = read_sides(section, kind, problems)
    wrong: tuple[str, ...] = ()
    try:
        problems.settle()
    except DataError as error:
        wrong = error.problems
    records = tuple(record for side in sides for record in side.records)
    unread = tuple(side.unread for side in sides)
    return CheckedRows(records=records, notes=tuple(problems.notes), unread=unread, problems=wrong)


def read_sides(section: DataSection, kind: RowKind, problems: Problems) -> tuple[Side, Side]:
    """What is under data.path and under data.eval_path. What is wrong goes to `problems`."""
    sides = (section.path, training_split(section)), (section.eval_path, held_out_split(section))
    train, held_out = (
        Side() if path is None else read_records(section, path, wanted, kind, problems) for path, wanted in sides
    )
    return train, held_out


def read_records(section: DataSection, path: str, wanted: Wanted, kind: RowKind, problems: Problems) -> Side:
    """The good rows under a path, read as what they mean. What is wrong goes to `problems`."""
    rows, meaning = read_rows(path, wanted, problems, section.max_row_bytes), ROWS[kind]
    if not rows:
        return Side()
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    try:
        columns = find_columns(section, names, meaning.response_names, meaning.label_names)
        if missing := meaning.missing(columns):
            raise DataError([f"data: no {need} (have {', '.join(names)})." for need in missing])
    except DataError as error:
        for problem in error.problems:
            problems.add(problem)
        return Side()
    records: list[Record] = []
    places: dict[str, str] = {}
    for row in with_float_labels(rows, columns.label):
        try:
            record = complete(with_system(meaning.parse(row, columns), columns), columns)
            if record.id in places:
                raise RowError(f'id "{record.id}" repeats {_place(places[record.id], row.file)}.')
            places[record.id] = row.where
            records.append(record)
        except RowError as error:
            problems.add_row(row.file, row.where, str(error))
    # What rows lack as a whole, a wrong one may have had.
    for problem in meaning.problems(records) if len(records) == len(rows) or section.max_bad_rows else ():
        problems.add(problem)
    to_rewards = kind is RowKind.PROMPTS
    return Side(records=records, unread=find_unread(rows, records, columns, meaning.reads(columns), to_rewards))


def evenly_spaced(records: Sequence[T], number: int | None) -> Sequence[T]:
    """`number` of the records, from the first to the last; all of them if there are no more, or with None."""
    if number is None or len(records) <= number:
        return records
    return [records[i * len(records) // number] for i in range(number)]


def _load(
    section: DataSection,
    kind: RowKind,
    make: Callable[[Record], list[T]],
    limit: str,
    text_of: Callable[[T], str],
    content: Callable[[T], bytes],
    notes: Mapping[str, int],
    max_rows: int | None,
) -> DataSplit[T]:
    if section.path is None:
        raise DataError("data.path: not given.")
    problems = Problems(section.max_bad_rows)
    dropped: Counter[str] = Counter()

    sides = read_sides(section, kind, problems)
    taken = [evenly_spaced(side.records, max_rows) for side in sides]
    try:
        items, given = (_make_all(records, make, section, limit, problems, dropped) for records in taken)
    except ModelError as error:  # wrong rows are known nevertheless
        try:
            problems.settle()
        except DataError as wrong:
            raise ConfigError([*error.problems, *wrong.problems]) from error
        raise
    note_unread(sides, problems)
    for what, count in notes.items():
        problems.note(f"{counted(count, 'conversation')}: {what}.")
    problems.settle()
    for note in problems.notes:
        logger.warning("%s", note)
    keys = [prompt_key(text_of(item)) for item in items]
    if section.eval_path is None:
        train, held_out = divide(items, keys, held_out_keys(keys, section.eval_fraction, section.split_seed))
    else:
        train, overlap = divide(items, keys, {prompt_key(text_of(item)) for item in given})
        held_out = tuple(given)
        dropped[ALSO_HELD_OUT] += len(overlap)
    dropped["wrong"] += problems.num_bad_rows
    counts = {reason: count for reason, count in dropped.items() if count}
    if not train:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.items())
        raise DataError(f"data: no row of {section.path} is left to train on (dropped: {reasons}).")
    num_rows = sum(map(len, taken)) + problems.num_bad_rows
    for reason, count in counts.items():
        logger.warning("%d of %s of %s: not used, %s", count, counted(num_rows, "row"), section.path, reason)
    return DataSplit(
        train=train, held_out=held_out, dropped=counts, fingerprint=fingerprint([train, held_out], content)
    )


def note_unread(sides: Sequence[Side], problems: Problems) -> None:
    """Note what nothing reads of the rows, where it is not known what rewards read."""
    for side in sides:
        for line in side.unread.lines(None):
            problems.note(line)


def _make_all(
    records: Sequence[Record],
    make: Callable[[Record], list[T]],
    section: DataSection,
    limit: str,
    problems: Problems,
    dropped: Counter[str],
) -> list[T]:
    items: list[T] = []
    overlong: list[Record] = []
    progress = Progress("tokenizing", len(records), "rows")
    for number, record in enumerate(records):
        progress.reach(number)
        try:
            items += make(record)
        except RowError as error:
            problems.add_row(record.row.file, record.row.where, str(error))
        except LeftOutError as error:
            dropped[str(error)] += 1
            if str(error) == OVERLONG:
                overlong.append(record)
    if overlong and section.overlong == "error":
        first, *others = [record.row for record in overlong[:2]]
        places = ", ".join([first.where, *(_place(row.where, first.file, "") for row in others)])
        problems.add(f"data: {len(overlong)} of {len(records)} {limit} (first: {places}). Use data.overlong=drop.")
    return items


def _place(where: str, file: str, word: str = "line ") -> str:
    """A row's place as seen from another row of `file`: the line alone where the file is the same."""
    return f"{word}{where.removeprefix(f'{file}:')}" if where.startswith(f"{file}:") else where
