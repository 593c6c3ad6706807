"""Rows that a run's reward sources cannot score: found before anything starts."""

from collections.abc import Iterable, Mapping, Sequence

from rlhf.config.data import DataSection
from rlhf.config.reward import AnswerSource, CodeSource, JudgeSource, Source
from rlhf.orchestrator.data.columns import LABEL
from rlhf.orchestrator.data.values import shown
from rlhf.types import Json


def unfit_rows(
    section: DataSection, sources: Sequence[Source], rows: Iterable[tuple[str, str | None, Mapping[str, Json]]]
) -> list[str]:
    """What rows (id, label, other columns) lack that the sources need, and labels that are no single value though a
    source compares answers with them: a line for each, the first few of them."""
    if not any(isinstance(source, AnswerSource | CodeSource | JudgeSource) for source in sources):
        return []
    from rlhf.engines.rewards import first_lines, row_line, row_problems  # noqa: PLC0415  slow to import

    rows = list(rows)
    name = _label_column(section, rows)
    comparing = ", ".join(source.label for source in sources if isinstance(source, AnswerSource))
    problems = [
        row_line(row_id, comparing, problem)
        for row_id, _, columns in (rows if comparing and name is not None else ())
        if (problem := _not_one_value(columns.get(name or ""))) is not None
    ]
    return first_lines(problems) or row_problems(sources, rows)


def _label_column(section: DataSection, rows: Sequence[tuple[str, str | None, Mapping[str, Json]]]) -> str | None:
    """The column that the labels came from."""
    there = {name for _, _, columns in rows for name in columns}
    return section.label_key or next((name for name in LABEL if name in there), None)


def _not_one_value(value: Json) -> str | None:
    """Why a label cannot be compared with an answer: a list of one value is this value, other ones are several."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, list | dict):
        return None
    what = f"a list of {len(value)} values" if isinstance(value, list) else "an object"
    return f"has a label that is {what} ({shown(value)}), need one text or number"
