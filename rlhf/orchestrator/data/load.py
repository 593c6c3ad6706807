"""Data sets as the loop wants them: prompts for online training, scored groups for training on given responses."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from rlhf.config.data import DataSection, RowKind
from rlhf.engines.base import Tokenizer
from rlhf.errors import DataError
from rlhf.orchestrator.data.columns import find_columns
from rlhf.orchestrator.data.encoding import Encoder, as_group, as_labels, as_steps, cut, cut_steps
from rlhf.orchestrator.data.problems import Problems, RowError
from rlhf.orchestrator.data.records import Record, read_record
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
from rlhf.types import Prompt, ScoredGroup

T = TypeVar("T")

logger = logging.getLogger(__name__)

OVERLONG = "over the token limit"
SAME_RESPONSES = "responses the same once tokenized and cut"
ALSO_HELD_OUT = "prompt also in eval_path"


class LeftOutError(Exception):
    """A row is fine but not used; says why."""


def load_prompts(section: DataSection, tokenizer: Tokenizer, max_prompt_tokens: int) -> DataSplit[Prompt]:
    """Prompts to be answered. Raises DataError with everything that is wrong with the rows."""
    encoder = Encoder(section, tokenizer)

    def make(record: Record) -> list[Prompt]:
        prompt = encoder.prompt(encoder.settle_kind(record))
        if len(prompt.token_ids) > max_prompt_tokens:
            raise LeftOutError(OVERLONG)
        return [prompt]

    limit = f"prompts exceed {max_prompt_tokens} tokens"
    return _load(section, RowKind.PROMPTS, make, limit, lambda prompt: prompt.text, prompt_content)


def load_demonstrations(section: DataSection, tokenizer: Tokenizer) -> DataSplit[ScoredGroup]:
    """Prompts with one given response each, whose tokens end in a stop token. Inside a response of several turns, other
    speakers' tokens are masked out. Raises DataError."""
    return _load_groups(section, tokenizer, RowKind.DEMONSTRATIONS)


def load_preferences(section: DataSection, tokenizer: Tokenizer) -> DataSplit[ScoredGroup]:
    """Prompts with two or more given responses each, best first. Raises DataError."""
    return _load_groups(section, tokenizer, RowKind.PREFERENCES)


def load_labeled(section: DataSection, tokenizer: Tokenizer) -> DataSplit[ScoredGroup]:
    """Prompts with one given response each, whose reward is 1 where it is labeled good and 0 where bad. A pair counts
    as two: the chosen response is good, the rejected one is bad, both on the same side of the split.

    Raises DataError, also where only one of the two labels is there.
    """
    encoder = Encoder(section, tokenizer)

    def make(record: Record) -> list[ScoredGroup]:
        group = _group(section, encoder, encoder.settle_kind(record))
        return [group] if record.desirable is not None else as_labels(group)

    return _load(section, RowKind.LABELED, make, _row_limit(section), lambda group: group.prompt.text, group_content)


def load_steps(section: DataSection, tokenizer: Tokenizer) -> DataSplit[ScoredGroup]:
    """Prompts with one response each in steps that are labeled good (1) or bad (0), for process reward models (Lightman
    et al. 2023).

    The rollout holds the tokens of all steps, each ended by data.step_separator; its `loss_mask` is True at the last
    token of each step, and its `step_labels` say how good these are, in order. Raises DataError.
    """
    encoder = Encoder(section, tokenizer)

    def make(record: Record) -> list[ScoredGroup]:
        settled = encoder.settle_kind(record)
        prompt = encoder.prompt(settled)
        whole = encoder.steps(settled, prompt)
        room = section.max_tokens - len(prompt.token_ids)
        response = cut_steps(whole, room)
        is_whole = len(response.token_ids) == len(whole.token_ids)
        if not len(response.token_ids) or not (is_whole or section.overlong == "truncate"):
            raise LeftOutError(OVERLONG)
        return [as_steps(prompt, response, is_whole, record)]

    return _load(section, RowKind.STEPS, make, _row_limit(section), lambda group: group.prompt.text, group_content)


def load_texts(section: DataSection, tokenizer: Tokenizer) -> DataSplit[ScoredGroup]:
    """Plain texts (column `text`) as responses to nothing, cut into blocks of at most max_tokens; where there is no
    such column, demonstrations."""
    encoder = Encoder(section, tokenizer)

    def make(record: Record) -> list[ScoredGroup]:
        if record.prompt:
            return [_group(section, encoder, encoder.settle_kind(record))]
        encoder.refuse_control_tokens(record)
        prompt = encoder.prompt(record)
        blocks = encoder.blocks(record, prompt, max(section.max_tokens - len(prompt.token_ids), 1))
        last = len(blocks) - 1
        return [
            as_group(replace(prompt, id=f"{prompt.id}#{index}"), [block], [index == last], record)
            for index, block in enumerate(blocks)
        ]

    return _load(section, RowKind.TEXTS, make, _row_limit(section), lambda group: group.texts[0], group_content)


def check_rows(section: DataSection, kind: RowKind) -> list[Record]:
    """Everything that can be known about the rows without a tokenizer: the good ones. Raises DataError."""
    problems = Problems(section.max_bad_rows)
    paths = [path for path in (section.path, section.eval_path) if path is not None]
    records = [record for path in paths for record in read_records(section, path, kind, problems)]
    problems.settle()
    return records


def read_records(section: DataSection, path: str, kind: RowKind, problems: Problems) -> list[Record]:
    """The good rows under a path, read as what they mean. What is wrong goes to `problems`."""
    rows = read_rows(path, section.split, problems)
    if not rows:
        return []
    try:
        columns = find_columns(section, list(dict.fromkeys(name for row in rows for name in row.values)), kind)
    except DataError as error:
        for problem in error.problems:
            problems.add(problem)
        return []
    records: list[Record] = []
    places: dict[str, str] = {}
    for row in rows:
        try:
            record = read_record(row, columns, kind)
            if record.id in places:
                raise RowError(f'id "{record.id}" repeats {_place(places[record.id], row.file)}.')
            places[record.id] = row.where
            records.append(record)
        except RowError as error:
            problems.add_row(row.file, row.where, str(error))
    labels = {record.desirable for record in records}
    if kind is RowKind.LABELED and labels in ({True}, {False}):
        problems.add(f"data: both labels are needed; all {len(records)} are {str(labels.pop()).lower()}.")
    return records


def _load_groups(section: DataSection, tokenizer: Tokenizer, kind: RowKind) -> DataSplit[ScoredGroup]:
    encoder = Encoder(section, tokenizer)

    def make(record: Record) -> list[ScoredGroup]:
        return [_group(section, encoder, encoder.settle_kind(record))]

    return _load(section, kind, make, _row_limit(section), lambda group: group.prompt.text, group_content)


def _group(section: DataSection, encoder: Encoder, record: Record) -> ScoredGroup:
    """A record's prompt and responses as tokens, within max_tokens. Raises LeftOutError."""
    prompt = encoder.prompt(record)
    whole = [encoder.response(record, prompt, response) for response in record.responses]
    room = section.max_tokens - len(prompt.token_ids)
    if any(len(response.token_ids) > room for response in whole) and (section.overlong != "truncate" or room < 1):
        raise LeftOutError(OVERLONG)
    responses = [cut(response, room) for response in whole]
    if len({response.token_ids.tobytes() for response in responses}) < len(responses):
        raise LeftOutError(SAME_RESPONSES)
    fits = [len(response.token_ids) <= room for response in whole]
    return as_group(prompt, responses, fits, record)


def _load(
    section: DataSection,
    kind: RowKind,
    make: Callable[[Record], list[T]],
    limit: str,
    text_of: Callable[[T], str],
    content: Callable[[T], bytes],
) -> DataSplit[T]:
    if section.path is None:
        raise DataError("data.path: not given.")
    problems = Problems(section.max_bad_rows)
    dropped: Counter[str] = Counter()

    def items_of(path: str) -> list[T]:
        records = read_records(section, path, kind, problems)
        return _make_all(records, make, section, limit, problems, dropped)

    items = items_of(section.path)
    given = items_of(section.eval_path) if section.eval_path is not None else []
    problems.settle()
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
        raise DataError(f"data: no row of {section.path} is left to train on (dropped: {counts}).")
    for reason, count in counts.items():
        logger.warning("%d of the rows of %s are not used: %s", count, section.path, reason)
    return DataSplit(
        train=train, held_out=held_out, dropped=counts, fingerprint=fingerprint([train, held_out], content)
    )


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
    for record in records:
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


def _row_limit(section: DataSection) -> str:
    return f"rows exceed {section.max_tokens} tokens (data.max_tokens)"


def _place(where: str, file: str, word: str = "line ") -> str:
    """A row's place as seen from another row of `file`: the line alone where the file is the same."""
    return f"{word}{where.removeprefix(f'{file}:')}" if where.startswith(f"{file}:") else where
