"""Prompts to be answered by the policy."""

from dataclasses import replace

from rlhf.orchestrator.data.columns import Columns
from rlhf.orchestrator.data.files import Row
from rlhf.orchestrator.data.kinds.base import PROMPT_NEEDED, Rows
from rlhf.orchestrator.data.records import Record, parse_dialogues, parse_prompt


class Prompts(Rows):
    """A prompt a row, with a reference answer and what reward functions want. Of preferences, their prompts."""

    holds = "prompts, with a reference answer if the reward needs one"

    def missing(self, columns: Columns) -> list[str]:
        return [] if columns.prompt or columns.chosen else [PROMPT_NEEDED]

    def reads(self, columns: Columns) -> set[str | None]:
        pair = set() if columns.prompt else {columns.chosen, columns.rejected}
        return super().reads(columns) | pair | {columns.label}

    def parse(self, row: Row, columns: Columns) -> Record:
        if columns.prompt is not None:
            return Record(row=row, prompt=parse_prompt(row, columns), names=(columns.prompt,))
        names = [name for name in (columns.chosen, columns.rejected) if name is not None]
        return replace(parse_dialogues(row, names), responses=(), names=("prompt",))
