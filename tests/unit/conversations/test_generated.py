"""Generated conversations through the chat templates of installed libraries: each is learned whole, refused by its row,
or what is left out of it is counted; none is shortened in silence.

`RLHF_TEST_CONVERSATIONS` is the number of conversations for each template.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from rlhf.config.commands import RowKind
from rlhf.config.data import DataSection
from rlhf.engines.models.tokenizer import HfTokenizer
from rlhf.orchestrator.data.columns import find_columns
from rlhf.orchestrator.data.encoding import THOUGHTS, TOOL_WORDS, Encoder
from rlhf.orchestrator.data.files import Row
from rlhf.orchestrator.data.kinds import OFFLINE_ROWS
from rlhf.orchestrator.data.problems import RowError
from rlhf.orchestrator.data.records import complete
from rlhf.types import Json, Message, ScoredGroup
from tests.unit.conversations.generated import Generated, conversations
from tests.unit.engines.models.chat_tokenizers import chat_tokenizer, shipped_templates

NUMBER = int(os.environ.get("RLHF_TEST_CONVERSATIONS", "4"))
TEMPLATES = shipped_templates()
SECTION = DataSection(path="x", max_tokens=1_000_000)
ROWS = OFFLINE_ROWS[RowKind.DEMONSTRATIONS]


def groups_of(made: Generated, encoder: Encoder) -> list[ScoredGroup]:
    """The row as a run reads it. Raises RowError."""
    columns = find_columns(SECTION, list(made.row), ROWS.response_names, ROWS.label_names)
    record = complete(ROWS.parse(Row(file="f", where="f:1", values=made.row), columns), columns)
    return ROWS.groups(SECTION, encoder, record)


def silently_lost(
    made: Generated, groups: Sequence[ScoredGroup], tokenizer: HfTokenizer, counted: set[str]
) -> list[str]:
    """The words that no model sees, or that are not learned though they are an assistant's, and that nothing counts."""
    learned, seen = "", ""
    for group in groups:
        (response,) = group.responses
        mask = np.ones(len(response.token_ids), dtype=bool) if response.loss_mask is None else response.loss_mask
        learned += tokenizer.decode(response.token_ids[mask].tolist(), skip_special_tokens=False)
        seen += tokenizer.decode([*group.prompt.token_ids, *response.token_ids], skip_special_tokens=False)
    lost = [word for words in made.said.values() for word in words if word not in seen]
    lost += [word for words in made.thought.values() for word in words if word not in seen and THOUGHTS not in counted]
    for index in made.learned:
        words = [*made.said.get(index, []), *made.thought.get(index, [])]
        lost += [f"{word} (not learned)" for word in words if word not in learned]
    if "tools" in made.row:
        lost += [name for name in made.tool_names if name not in seen]
        lost += [] if TOOL_WORDS in counted else [name for name in made.tool_names if f"does {name}" not in seen]
    return lost


def test_the_libraries_ship_many_templates() -> None:
    assert len(TEMPLATES) >= 80


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_conversation_is_shortened_in_silence(name: str) -> None:
    tokenizer = HfTokenizer(chat_tokenizer(TEMPLATES[name], bos="<bos>"))
    outcomes: Counter[str] = Counter()
    for made in conversations(0, NUMBER):
        encoder = Encoder(SECTION, tokenizer)
        try:
            groups = groups_of(made, encoder)
        except RowError:
            outcomes["refused"] += 1
            continue
        assert silently_lost(made, groups, tokenizer, set(encoder.notes)) == [], made.row
        outcomes["counted" if encoder.notes else "whole"] += 1
    print(name, dict(outcomes))  # noqa: T201  the figures of a long run
    assert sum(outcomes.values()) == NUMBER


class Counting(HfTokenizer):
    """Counts how often each conversation is rendered."""

    asked: Counter[tuple[tuple[Message, ...], str, bool]]

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[Json] = ()) -> str:
        self.asked[tuple(messages), json.dumps(tools), add_generation_prompt] += 1
        return super().render(messages, add_generation_prompt=add_generation_prompt, tools=tools)


def test_no_conversation_of_a_row_is_rendered_twice() -> None:
    tokenizer = Counting(chat_tokenizer(TEMPLATES["trl/qwen2_5"], bos="<bos>"))
    encoder = Encoder(SECTION, tokenizer)
    num_used = 0
    for made in conversations(0, 100):
        tokenizer.asked = Counter()
        try:
            groups_of(made, encoder)
        except RowError:
            continue
        num_used += 1
        assert max(tokenizer.asked.values()) == 1
    assert num_used > 50
