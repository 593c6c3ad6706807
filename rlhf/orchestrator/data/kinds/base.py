"""What a kind of rows is: the columns that it needs, what a row means, and the tokens that a run gets from it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from rlhf.config.data import DataSection
from rlhf.orchestrator.data.columns import LABEL, RESPONSE, Columns
from rlhf.orchestrator.data.encoding import EncodedResponse, Encoder, as_group, cut
from rlhf.orchestrator.data.files import Row
from rlhf.orchestrator.data.records import Record
from rlhf.types import Prompt, ScoredGroup

OVERLONG = "over the token limit"
SAME_RESPONSES = "responses the same once tokenized and cut"
PROMPT_NEEDED = "prompt column; set data.prompt_key"


class LeftOutError(Exception):
    """A row is fine but not used; says why."""


class Rows(ABC):
    """One kind of rows."""

    holds: ClassVar[str]
    """What a row holds, for the pages about methods."""
    response_names: ClassVar[Sequence[str]] = RESPONSE
    """Usual names of the column of the response."""
    label_names: ClassVar[Sequence[str]] = LABEL
    """Usual names of the column of the label."""

    @abstractmethod
    def missing(self, columns: Columns) -> list[str]:
        """The columns that are needed and not there, and the setting that names each."""

    def reads(self, columns: Columns) -> set[str | None]:
        """The columns that mean something besides those that hold the records' prompts and responses."""
        extra = "input" if columns.prompt == "instruction" else None
        return {columns.id, columns.system, extra}

    @abstractmethod
    def parse(self, row: Row, columns: Columns) -> Record:
        """What a row means. Raises RowError where it means nothing."""

    def problems(self, records: Sequence[Record]) -> list[str]:
        """What is wrong with the rows as a whole, though each is fine."""
        return []

    def readings(self, encoder: Encoder, record: Record) -> list[Record]:
        """The records that are learned of one whose kind of text is settled. Raises RowError."""
        return [record]

    def encode(self, encoder: Encoder, record: Record) -> tuple[Prompt, list[EncodedResponse]]:
        """A record's prompt and responses as tokens, not cut. Raises RowError."""
        prompt = encoder.prompt(record)
        return prompt, [encoder.response(record, prompt, response) for response in record.responses]


class OfflineRows(Rows):
    """One kind of rows with responses to train on."""

    def groups(self, section: DataSection, encoder: Encoder, record: Record) -> list[ScoredGroup]:
        """A record's prompt and responses as tokens, within data.max_tokens. Raises RowError or LeftOutError."""
        settled = self.readings(encoder, encoder.settle_kind(record))
        return [self.one_group(section, encoder, one) for one in settled]

    def split_text(self, group: ScoredGroup) -> str:
        """The text by which rows are divided into training and evaluation."""
        return group.prompt.text

    def one_group(self, section: DataSection, encoder: Encoder, record: Record) -> ScoredGroup:
        """A record whose kind of text is settled, as one group. Raises RowError or LeftOutError."""
        prompt, whole = self.encode(encoder, record)
        room = section.max_tokens - len(prompt.token_ids)
        if any(len(response.token_ids) > room for response in whole) and (section.overlong != "truncate" or room < 1):
            raise LeftOutError(OVERLONG)
        responses = [cut(response, room) for response in whole]
        if len({response.token_ids.tobytes() for response in responses}) < len(responses):
            raise LeftOutError(SAME_RESPONSES)
        fits = [len(response.token_ids) <= room for response in whole]
        return as_group(prompt, responses, fits, record)
