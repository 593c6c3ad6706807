"""What is in a data set, and what a training run would stumble over or quietly learn. Pure functions of its records."""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from rlhf.orchestrator.data.records import Record, Text
from rlhf.types import Json, Message

Facts: TypeAlias = dict[str, Json]

PERCENTILES = (5, 50, 95, 99)
MAX_LENGTH_BIAS = 0.1
"""How far from one half the share of pairs may be whose better response is the longer one."""
KTO_BALANCE = (1.0, 4.0 / 3.0)
"""Weight of the desirable responses over that of the undesirable ones (Ethayarajh et al. 2024, section 4.2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long a record's prompt and responses are. `same_when_cut`: two responses are equal within the limit."""

    prompt: int
    responses: tuple[int, ...] = ()
    same_when_cut: bool = False


Measure: TypeAlias = Callable[[Record], Lengths]


def text_of(text: Text) -> str:
    """A text, or messages as one text."""
    return text if isinstance(text, str) else "\n".join(map(_line_of, text))


def _line_of(turn: Message) -> str:
    more = f" {json.dumps(dict(turn.fields), sort_keys=True, ensure_ascii=False)}" if turn.fields else ""
    return f"{turn.role}: {turn.content}{more}"


def responses_of(record: Record) -> list[str]:
    """A record's responses as texts; of steps, the whole."""
    return ["\n".join(record.steps)] if record.steps else [text_of(response) for response in record.responses]


def near_key(text: str) -> str:
    """What makes two texts nearly the same: their words, whatever case, spaces and punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def characters(record: Record) -> Lengths:
    """Lengths in characters, where no tokenizer is given."""
    return Lengths(prompt=len(text_of(record.prompt)), responses=tuple(map(len, responses_of(record))))


def facts_of(records: Sequence[Record], measure: Measure, max_prompt: int | None, max_total: int | None) -> Facts:
    """Everything about one side of a data set. Limits are in the unit of `measure`; None: not checked."""
    lengths = [measure(record) for record in records]
    facts: Facts = {
        "rows": len(records),
        "prompts": len({text_of(record.prompt) for record in records}),
        **_duplicates(records),
    }
    if any(len(record.responses) > 1 for record in records):
        facts["pairs"] = _pairs(records, lengths)
    if (labels := _labels(records)) is not None:
        facts["labels"] = labels
    if any(record.steps for record in records):
        facts["steps"] = _steps(records)
    facts["lengths"] = _lengths(lengths, max_prompt, max_total)
    return facts


def across(train: Sequence[Record], held_out: Sequence[Record]) -> Facts:
    """What both sides have in common: held-out rows that training has seen."""

    def count(key: Callable[[Record], Sequence[str]], near: bool) -> int:
        def keys(record: Record) -> set[str]:
            return {near_key(text) if near else text for text in key(record)} - {""}

        seen = {text for record in train for text in keys(record)}
        return sum(bool(keys(record) & seen) for record in held_out)

    def prompt(record: Record) -> list[str]:
        return [text_of(record.prompt)]

    return {
        "prompts": count(prompt, near=False),
        "prompts_nearly": count(prompt, near=True),
        "responses": count(responses_of, near=False),
        "responses_nearly": count(responses_of, near=True),
    }


def _duplicates(records: Sequence[Record]) -> Facts:
    """Rows that repeat an earlier one in every word, or in every word but for case, spaces and punctuation."""
    exact = Counter((text_of(record.prompt), *responses_of(record)) for record in records)
    near = Counter(tuple(map(near_key, key)) for key in exact)
    return {"repeated": len(records) - len(exact), "nearly_repeated": len(exact) - len(near)}


def _pairs(records: Sequence[Record], lengths: Sequence[Lengths]) -> Facts:
    """Best against worst of each record."""
    paired = [(record, responses_of(record), length) for record, length in zip(records, lengths, strict=True)]
    orders = {(text_of(record.prompt), responses[0], responses[-1]) for record, responses, _ in paired}
    gaps = np.array([length.responses[0] - length.responses[-1] for _, _, length in paired])
    return {
        "nearly_the_same": sum(near_key(responses[0]) == near_key(responses[-1]) for _, responses, _ in paired),
        "contradictory": sum((prompt, worst, best) in orders for prompt, best, worst in orders) // 2,
        "same_when_cut": sum(length.same_when_cut for length in lengths),
        "chosen_longer": float(np.mean(gaps > 0)),
        "equally_long": float(np.mean(gaps == 0)),
        "mean_difference": float(np.mean(gaps)),
    }


def _labels(records: Sequence[Record]) -> Facts | None:
    """Desirable against undesirable responses; a pair without labels of its own counts as one of each."""
    if any(record.desirable is None for record in records):
        return None
    good = sum(record.desirable is True for record in records)
    labels: dict[tuple[str, str], set[bool]] = {}
    for record in records:
        key = (text_of(record.prompt), *responses_of(record))
        labels.setdefault((key[0], key[1]), set()).add(record.desirable is True)
    return {
        "desirable": good,
        "undesirable": len(records) - good,
        "contradictory": sum(len(both) == 2 for both in labels.values()),
    }


def _steps(records: Sequence[Record]) -> Facts:
    labels = [label for record in records for label in record.step_labels]
    return {
        "steps": len(labels),
        "mean_per_response": len(labels) / len(records),
        "mean_label": float(np.mean(labels)),
        "responses_without_a_bad_step": sum(all(label > 0.5 for label in record.step_labels) for record in records),
    }


def _lengths(lengths: Sequence[Lengths], max_prompt: int | None, max_total: int | None) -> Facts:
    columns = {"prompt": [length.prompt for length in lengths]}
    num_responses = max((len(length.responses) for length in lengths), default=0)
    names = ["response"] if num_responses == 1 else ["chosen", "rejected"] if num_responses else []
    for name, place in zip(names, (0, -1), strict=False):
        columns[name] = [length.responses[place] for length in lengths if length.responses]
    totals = [length.prompt + max(length.responses) for length in lengths if length.responses]
    if totals:
        columns["prompt_and_answer"] = totals
    facts: Facts = {name: _percentiles(column) for name, column in columns.items() if column}
    if max_prompt is not None:
        facts["prompts_over"] = sum(length.prompt > max_prompt for length in lengths)
    if max_total is not None and totals:
        facts["rows_over"] = sum(total > max_total for total in totals)
        facts["of_these_by_the_prompt_alone"] = sum(length.prompt >= max_total for length in lengths)
    return facts


def _percentiles(column: Sequence[int]) -> Facts:
    found = np.percentile(column, PERCENTILES)
    named: Facts = {f"p{percent}": round(float(value), 1) for percent, value in zip(PERCENTILES, found, strict=True)}
    return named | {"max": max(column), "mean": round(float(np.mean(column)), 1)}


def warnings_of(train: Mapping[str, Json], shared: Mapping[str, Json]) -> list[str]:
    """What probably is not meant, one line each."""
    lines = []
    if shared["prompts_nearly"]:
        lines.append(
            f"{shared['prompts_nearly']} held-out rows have a prompt that is trained on: what is measured on them says "
            "too much."
        )
    match train.get("pairs"):
        case {"chosen_longer": float(longer), "equally_long": float(equal), "contradictory": int(contradictory)}:
            share = longer + equal / 2
            if abs(share - 0.5) > MAX_LENGTH_BIAS:
                lines.append(
                    f"the better response is the longer one in {share:.0%} of pairs: length may be what is taught."
                )
            if contradictory:
                lines.append(f"pairs that are there in both orders: {contradictory}.")
    match train.get("labels"):
        case {"desirable": int(good), "undesirable": int(bad)} if good and bad:
            lines += _balance_advice(good, bad)
    if train.get("repeated"):
        lines.append(f"rows that repeat another one: {train['repeated']}. Each weighs twice.")
    return lines


def _balance_advice(good: int, bad: int) -> list[str]:
    """KTO wants the weighted desirable responses to be 1 to 4/3 of the weighted undesirable ones."""
    low, high = KTO_BALANCE
    ratio = good / bad
    if low <= ratio <= high:
        return []
    if ratio < low:
        return [
            f"{good} desirable to {bad} undesirable responses: KTO wants 1:1 to 4:3. Weigh the desirable ones by "
            f"{low / ratio:.3g} to {high / ratio:.3g}."
        ]
    return [
        f"{good} desirable to {bad} undesirable responses: KTO wants 1:1 to 4:3. Weigh the undesirable ones by "
        f"{ratio / high:.3g} to {ratio / low:.3g}."
    ]
