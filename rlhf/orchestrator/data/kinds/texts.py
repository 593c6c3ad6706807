"""Plain texts, for the loss on pretraining text."""

from dataclasses import replace

from rlhf.config.data import DataSection
from rlhf.orchestrator.data.columns import Columns
from rlhf.orchestrator.data.encoding import Encoder, as_group
from rlhf.orchestrator.data.files import Row
from rlhf.orchestrator.data.kinds.demonstrations import Demonstrations, plain_text
from rlhf.orchestrator.data.records import Record
from rlhf.types import ScoredGroup


class Texts(Demonstrations):
    """Texts (column `text`) as responses to nothing, cut into blocks of at most data.max_tokens; where there is no such
    column, demonstrations."""

    holds = "plain texts"

    def missing(self, columns: Columns) -> list[str]:
        return [] if columns.text or columns.prompt else ["text column"]

    def reads(self, columns: Columns) -> set[str | None]:
        return super().reads(columns) if columns.text is None else {columns.id}

    def parse(self, row: Row, columns: Columns) -> Record:
        if columns.text is None:
            return super().parse(row, columns)
        return plain_text(row, columns.text)

    def groups(self, section: DataSection, encoder: Encoder, record: Record) -> list[ScoredGroup]:
        if record.prompt:
            return super().groups(section, encoder, record)
        encoder.refuse_control_tokens(record)
        prompt = encoder.prompt(record)
        blocks = encoder.blocks(record, prompt, max(section.max_tokens - len(prompt.token_ids), 1))
        last = len(blocks) - 1
        return [
            as_group(replace(prompt, id=f"{prompt.id}#{index}"), [block], [index == last], record)
            for index, block in enumerate(blocks)
        ]

    def split_text(self, group: ScoredGroup) -> str:
        return group.texts[0]
