"""Prompts with a good response."""

from itertools import takewhile

from rlhf.config.data import DataSection
from rlhf.orchestrator.data.columns import Columns
from rlhf.orchestrator.data.dialogue import check_prompt, first_prompt, is_dialogue, parse_text
from rlhf.orchestrator.data.encoding import FIRST_PROMPT, Encoder
from rlhf.orchestrator.data.files import Row
from rlhf.orchestrator.data.kinds.base import OfflineRows
from rlhf.orchestrator.data.problems import RowError
from rlhf.orchestrator.data.records import Record, continued, parse_pair, parse_response, prompt_or_conversation
from rlhf.types import Message, ScoredGroup

PROMPT_OR_TEXT = "prompt column, and no column text; set data.prompt_key"


class Demonstrations(OfflineRows):
    """One response a prompt, whose tokens end in a stop token. Inside a response of several turns, other speakers'
    tokens are masked out. Of preferences, the better response. A row with a column `text` alone is a response to
    nothing: every token is learned."""

    holds = "prompts with a good response"

    def missing(self, columns: Columns) -> list[str]:
        return [] if columns.prompt or columns.chosen or columns.text else [PROMPT_OR_TEXT]

    def readings(self, encoder: Encoder, record: Record) -> list[Record]:
        return encoder.by_turn(record)

    def split_text(self, group: ScoredGroup) -> str:
        """The prompt; of a turn that is learned by itself, that of its conversation, which stays on one side; of a
        plain text, the text."""
        return str(group.prompt.metadata.get(FIRST_PROMPT, group.prompt.text)) or group.texts[0]

    def groups(self, section: DataSection, encoder: Encoder, record: Record) -> list[ScoredGroup]:
        if record.prompt:
            return super().groups(section, encoder, record)
        encoder.refuse_control_tokens(record)  # a text is what it is, whatever data.template says
        return [self.one_group(section, encoder, record)]

    def parse(self, row: Row, columns: Columns) -> Record:
        if columns.prompt is None:
            return plain_text(row, columns.text) if columns.chosen is None else _chosen(row, columns)
        given = prompt_or_conversation(row, columns)
        name = columns.response or columns.chosen
        whole = not isinstance(given, str) and given[-1].role == "assistant" and not columns.response_given
        if name is not None and not whole:
            return parse_pair(row, columns, name)
        if isinstance(given, str):
            raise RowError("no response (no response column); set data.response_key.")
        return _conversation(row, given, columns.prompt)


def plain_text(row: Row, name: str | None) -> Record:
    """The text of a column as a response to nothing."""
    assert name is not None, "it is a column that such rows need"
    text = parse_text(row.values.get(name), name)
    return Record(row=row, prompt="", responses=(text,), names=("prompt", name))


def _chosen(row: Row, columns: Columns) -> Record:
    """The better response of a preference without a prompt column: a whole dialogue or conversation."""
    assert columns.chosen is not None, "it is a column that rows without a prompt need"
    response = parse_response(row.values.get(columns.chosen), columns.chosen)
    if not isinstance(response, str):
        return _conversation(row, response, columns.chosen)
    if not is_dialogue(response):
        raise RowError(f"{columns.chosen} is no dialogue (Human: ... Assistant: ...), and there is no prompt column.")
    return continued(row, first_prompt(response), [response], [columns.chosen])


def _conversation(row: Row, messages: tuple[Message, ...], name: str) -> Record:
    """A demonstration given whole: the prompt is what stands before the assistant's first turn."""
    if messages[-1].role != "assistant":
        raise RowError("last message must be from assistant.")
    prompt = tuple(takewhile(lambda message: message.role != "assistant", messages))
    if not prompt:
        raise RowError(f"{name} begins with the assistant.")
    check_prompt(prompt, name)
    return Record(row=row, prompt=prompt, responses=(messages[len(prompt) :],), names=(name, name))
