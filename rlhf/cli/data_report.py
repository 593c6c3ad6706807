"""`rlhf data`: what is in a data set, and what is wrong with it."""

import json
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf.cli.shown_row import shown_row
from rlhf.config.commands import RowKind
from rlhf.config.data import DataSection
from rlhf.config.tools import DataConfig
from rlhf.engines.base import Tokenizer
from rlhf.orchestrator.data.columns import find_columns
from rlhf.orchestrator.data.encoding import Encoder, cut
from rlhf.orchestrator.data.kinds import ROWS
from rlhf.orchestrator.data.kinds.base import Rows
from rlhf.orchestrator.data.load import note_unread, read_sides
from rlhf.orchestrator.data.problems import Problems, RowError
from rlhf.orchestrator.data.records import Record
from rlhf.orchestrator.data.report import (
    PERCENTILES,
    Facts,
    Lengths,
    Measure,
    across,
    characters,
    facts_of,
    text_of,
    warnings_of,
)
from rlhf.orchestrator.data.split import divide, held_out_keys, prompt_key
from rlhf.terminal import counted, rich_console, show_logs, write
from rlhf.types import Json

WITH_LABEL = (RowKind.PROMPTS, RowKind.LABELED, RowKind.STEPS)
"""Kinds of rows whose label a run uses."""


def run_data_report(config: DataConfig) -> int:
    """Print the report; then raise DataError if training would refuse the rows. Returns the exit code."""
    assert config.kind is not None, "checked by the config's loader"
    assert config.data.path is not None, "checked by the config's loader"
    problems = Problems(config.data.max_bad_rows)
    show_logs()
    sides = read_sides(config.data, config.kind, problems)
    note_unread(sides, problems)
    records, given = (list(side.records) for side in sides)
    measure: Measure = characters
    console = rich_console(soft_wrap=True)
    row: list[Text] = []
    if config.tokenizer is not None:
        tokenizer = open_tokenizer(config, config.tokenizer)
        records, given, measure = tokenized(config, tokenizer, (records, given), problems)
        row = one_row(config, tokenizer, records, in_color=console.color_system is not None)
    report = make_report(config, records, given, measure, problems)
    if config.as_json:
        write(json.dumps(report, indent=1) + "\n")
    else:
        show(report, console)
        for line in row or [
            Text("--tokenizer MODEL shows a row as the model gets it, with the tokens that are trained.")
        ]:
            console.print(line)
    problems.settle()
    return 0


def make_report(
    config: DataConfig, records: Sequence[Record], given: Sequence[Record], measure: Measure, problems: Problems
) -> Facts:
    """The whole report as JSON values."""
    section = config.data
    train, held_out = tuple(records), tuple(given)
    if section.eval_path is None and section.eval_fraction:
        keys = [prompt_key(text_of(record.prompt or record.responses[0])) for record in records]
        train, held_out = divide(records, keys, held_out_keys(keys, section.eval_fraction, section.split_seed))
    in_tokens = config.tokenizer is not None
    limits = (
        config.max_prompt_tokens if in_tokens and config.kind is RowKind.PROMPTS else None,
        section.max_tokens if in_tokens else None,
    )
    report: Facts = {
        "kind": config.kind,
        "path": section.path,
        "columns": columns_of(config, records),
        "unit": "tokens" if in_tokens else "characters",
        "wrong": {what: {"rows": count, "first": first} for what, (count, first) in problems.reasons.items()},
        "train": facts_of(train, measure, *limits) if train else {"rows": 0},
    }
    if held_out:
        report["held_out"] = facts_of(held_out, measure, *limits)
    shared = across(train, held_out)
    report["on_both_sides"] = shared if held_out else None
    facts = report["train"]
    assert isinstance(facts, dict), "made above"
    report["warnings"] = [*problems.notes, *warnings_of(facts, shared)]
    return report


def columns_of(config: DataConfig, records: Sequence[Record]) -> Facts:
    """Which columns are read as what, as the first row has them."""
    assert config.kind is not None, "checked by the config's loader"
    if not records:
        return {}
    prompt, *responses = (name.partition("[")[0] for name in records[0].names)
    columns: Facts = {"prompt": prompt}
    if responses:
        columns["responses"] = ", ".join(dict.fromkeys(responses))
    if config.kind in WITH_LABEL and any(record.label is not None or record.names[1:] for record in records):
        rows, there = ROWS[config.kind], dict.fromkeys(name for record in records for name in record.row.values)
        label = find_columns(config.data, [*there], rows.response_names, rows.label_names).label
        columns |= {"label": label} if label is not None else {}
    return columns


def open_tokenizer(config: DataConfig, model: str) -> Tokenizer:
    """The tokenizer of a model, with the chat template that the rows are to be rendered with."""
    from rlhf.engines.models.tokenizer import load_tokenizer  # noqa: PLC0415  not in a plain install

    return load_tokenizer(model, key="tokenizer", chat_template=config.data.chat_template, plain=True)


def one_row(config: DataConfig, tokenizer: Tokenizer, records: Sequence[Record], *, in_color: bool) -> list[Text]:
    """The first good record as tokens; empty if there is none."""
    assert config.kind is not None, "checked by the config's loader"
    if not records:
        return []
    rows, encoder = ROWS[config.kind], Encoder(config.data, tokenizer)
    first = rows.readings(encoder, encoder.settle_kind(records[0]))[0]
    prompt, responses = rows.encode(encoder, first)
    return list(shown_row(prompt, responses, tokenizer, in_color=in_color))


def tokenized(
    config: DataConfig, tokenizer: Tokenizer, sides: tuple[list[Record], list[Record]], problems: Problems
) -> tuple[list[Record], list[Record], Measure]:
    """The records that the tokenizer accepts, and their lengths in tokens, with prompts as a run would render them."""
    assert config.kind is not None, "checked by the config's loader"
    rows, encoder = ROWS[config.kind], Encoder(config.data, tokenizer)
    lengths: dict[int, Lengths] = {}

    def kept(records: Sequence[Record]) -> list[Record]:
        good = []
        for record in records:
            try:
                lengths[id(record)] = measured(rows, config.data, encoder, encoder.settle_kind(record))
                good.append(record)
            except RowError as error:
                problems.add_row(record.row.file, record.row.where, str(error))
        return good

    train, held_out = map(kept, sides)
    for what, count in encoder.notes.items():
        problems.note(f"{counted(count, 'conversation')}: {what}.")
    return train, held_out, lambda record: lengths[id(record)]


def measured(rows: Rows, section: DataSection, encoder: Encoder, record: Record) -> Lengths:
    """Lengths in tokens, including stop tokens; of turns that are learned one by one, those of the longest."""
    encoded = [rows.encode(encoder, one) for one in rows.readings(encoder, record)]
    prompt, responses = max(encoded, key=lambda one: len(one[0].token_ids) + sum(len(r.token_ids) for r in one[1]))
    room = section.max_tokens - len(prompt.token_ids)
    return Lengths(
        prompt=len(prompt.token_ids),
        responses=tuple(len(response.token_ids) for response in responses),
        same_when_cut=room > 0
        and len({cut(response, room).token_ids.tobytes() for response in responses}) < len(responses),
    )


def show(report: Mapping[str, Json], console: Console) -> None:
    """The report for people: a table of facts, a table of lengths, then errors and warnings."""
    sides = {
        name.replace("_", " "): side for name in ("train", "held_out") if isinstance(side := report.get(name), dict)
    }
    facts = Table(title=f"{report['path']} as {report['kind']}")
    for heading in ("", *sides):
        facts.add_column(heading, justify="right" if heading else "left")
    columns = [dict(lines_of(side)) for side in sides.values()]
    for name in dict.fromkeys(name for column in columns for name in column):
        facts.add_row(name, *(column.get(name, "") for column in columns))
    if isinstance(shared := report.get("on_both_sides"), dict):
        for name, value in shared.items():
            facts.add_row(f"also trained on: {name.replace('_', ' ')}", "", str(value))
    console.print(facts)
    console.print(length_table(sides, str(report["unit"])))
    if isinstance(meant := report["columns"], dict) and meant:
        read = ", ".join(f"{what} = {name}" for what, name in meant.items())
        console.print(f"columns: {read}", markup=False, highlight=False)
    wrong, warnings = report["wrong"], report["warnings"]
    for what, found in wrong.items() if isinstance(wrong, dict) else ():
        if isinstance(found, dict):
            console.print(
                f"wrong rows: {found['rows']} (first {found['first']}): {what}",
                markup=False,
                highlight=False,
            )
    for line in warnings if isinstance(warnings, list) else []:
        console.print(f"note: {line}", markup=False, highlight=False)


def lines_of(facts: Mapping[str, Json], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as names and values, without the percentiles."""
    lines: list[tuple[str, str]] = []
    for name, value in facts.items():
        label = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, dict):
            lines += [] if "max" in value else lines_of(value, f"{label}: ")
        else:
            lines.append((label, f"{value:.4g}" if isinstance(value, float) else str(value)))
    return lines


def length_table(sides: Mapping[str, Mapping[str, Json]], unit: str) -> Table:
    """Percentiles of the lengths of prompts and responses."""
    table = Table(title=f"Lengths in {unit}")
    headings = [*(f"p{percent}" for percent in PERCENTILES), "max", "mean"]
    for heading in ("", *headings):
        table.add_column(heading, justify="right" if heading else "left")
    for side, facts in sides.items():
        lengths = facts.get("lengths")
        for name, values in lengths.items() if isinstance(lengths, dict) else ():
            if isinstance(values, dict):
                table.add_row(f"{side}: {name.replace('_', ' ')}", *(f"{values[heading]:g}" for heading in headings))
    return table
