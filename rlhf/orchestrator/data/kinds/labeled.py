"""Prompts with a response that is labeled good or bad."""

from collections.abc import Sequence
from dataclasses import replace

from rlhf.config.data import DataSection
from rlhf.orchestrator.data.columns import Columns
from rlhf.orchestrator.data.encoding import Encoder, as_labels
from rlhf.orchestrator.data.files import Row
from rlhf.orchestrator.data.kinds.base import PROMPT_NEEDED, OfflineRows
from rlhf.orchestrator.data.kinds.preferences import parse_preference
from rlhf.orchestrator.data.problems import RowError
from rlhf.orchestrator.data.records import Record, parse_pair
from rlhf.orchestrator.data.values import shown
from rlhf.types import ScoredGroup

LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
"""What a label may be, as text or as a number."""


class Labeled(OfflineRows):
    """One response a prompt, whose reward is 1 where it is labeled good and 0 where bad. A pair counts as two: the
    chosen response is good, the rejected one is bad, both on the same side of the split."""

    holds = "prompts with a response that is labeled good or bad; pairs are read as two labels"

    def missing(self, columns: Columns) -> list[str]:
        if columns.pairs_as_labels:
            return []
        needs = [
            (columns.prompt, PROMPT_NEEDED),
            (columns.response, "response column; set data.response_key"),
            (columns.label, "label column; set data.label_key"),
        ]
        return [what for name, what in needs if name is None]

    def reads(self, columns: Columns) -> set[str | None]:
        return super().reads(columns) | (set() if columns.pairs_as_labels else {columns.label})

    def parse(self, row: Row, columns: Columns) -> Record:
        if columns.pairs_as_labels:
            return parse_preference(row, columns)
        assert columns.response is not None, "it is a column that labeled rows need"
        assert columns.label is not None, "it is a column that labeled rows need"
        value = row.values.get(columns.label)
        meaning = LABELS.get(str(value).lower())
        if meaning is None:
            raise RowError(f"{columns.label} must be true or false, or 1 or 0 (got {shown(value)}).")
        return replace(parse_pair(row, columns, columns.response), desirable=meaning)

    def problems(self, records: Sequence[Record]) -> list[str]:
        """Both labels are needed."""
        labels = {record.desirable for record in records}
        if labels not in ({True}, {False}):
            return []
        return [f"data: both labels are needed; all {len(records)} are {str(labels.pop()).lower()}."]

    def groups(self, section: DataSection, encoder: Encoder, record: Record) -> list[ScoredGroup]:
        (group,) = super().groups(section, encoder, record)
        return [group] if record.desirable is not None else as_labels(group)
