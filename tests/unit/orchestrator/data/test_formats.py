"""Rows as other projects publish them: TRL's formats, OpenRLHF's, GSM8K's and HH's, each read as what it means."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.config.data import DataSection
from rlhf.engines.base import Tokenizer
from rlhf.orchestrator.data import DataSplit, load_prompts
from rlhf.types import Json, ScoredGroup
from tests.unit.orchestrator.data.data_support import (
    CHAT,
    PLAIN,
    load_demonstrations,
    load_labeled,
    load_preferences,
    load_steps,
    section,
    write_rows,
)

SKY: Json = {"role": "user", "content": "What color is the sky?"}
BLUE: Json = {"role": "assistant", "content": "It is blue."}
GREEN: Json = {"role": "assistant", "content": "It is green."}
ASKED = "<|im_start|>user\nWhat color is the sky?<|im_end|>\n<|im_start|>assistant\n"
Loader = Callable[[DataSection, Tokenizer], DataSplit[ScoredGroup]]

TRL: list[tuple[str, Loader, dict[str, Json], str, list[str]]] = [
    (
        "preference, implicit prompt, standard",
        load_preferences,
        {"id": "s1", "chosen": "The sky is blue.", "rejected": "The sky is green."},
        "The sky is",
        [" blue.", " green."],
    ),
    (
        "preference, explicit prompt, standard",
        load_preferences,
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        "The sky is",
        [" blue.", " green."],
    ),
    (
        "preference, implicit prompt, conversational",
        load_preferences,
        {"chosen": [SKY, BLUE], "rejected": [SKY, GREEN]},
        ASKED,
        ["It is blue.", "It is green."],
    ),
    (
        "preference, explicit prompt, conversational",
        load_preferences,
        {"prompt": [SKY], "chosen": [BLUE], "rejected": [GREEN]},
        ASKED,
        ["It is blue.", "It is green."],
    ),
    (
        "prompt-completion, standard",
        load_demonstrations,
        {"prompt": "The sky is", "completion": " blue."},
        "The sky is",
        [" blue."],
    ),
    (
        "prompt-completion, conversational",
        load_demonstrations,
        {"prompt": [SKY], "completion": [BLUE]},
        ASKED,
        ["It is blue."],
    ),
    ("language modeling, conversational", load_demonstrations, {"messages": [SKY, BLUE]}, ASKED, ["It is blue."]),
    (
        "stepwise supervision",
        load_steps,
        {"prompt": "Which is larger, 9.8 or 9.11?", "completions": ["0.11.", "So 9.11."], "labels": [True, False]},
        "Which is larger, 9.8 or 9.11?",
        ["0.11.\nSo 9.11.\n"],
    ),
    (
        "OpenRLHF: whole conversations",
        load_preferences,
        {"chosen": [SKY, BLUE], "rejected": [SKY, GREEN], "source": "x", "chosen_score": 3.0},
        ASKED,
        ["It is blue.", "It is green."],
    ),
    (
        "OpenRLHF: input and output",
        load_demonstrations,
        {"input": "The sky is", "output": " blue."},
        "The sky is",
        [" blue."],
    ),
    (
        "UltraFeedback, binarized",
        load_preferences,
        {"prompt": "What color is the sky?", "messages": [SKY, BLUE], "chosen": [SKY, BLUE], "rejected": [SKY, GREEN]},
        ASKED,
        ["It is blue.", "It is green."],
    ),
    (
        "HH",
        load_preferences,
        {"chosen": "\n\nHuman: hi\n\nAssistant: yo", "rejected": "\n\nHuman: hi\n\nAssistant: you"},
        "\n\nHuman: hi\n\nAssistant:",
        [" yo", " you"],
    ),
    (
        "GSM8K",
        load_demonstrations,
        {"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"},
        "1 + 1?",
        ["1 + 1 = 2\n#### 2"],
    ),
]


@pytest.mark.parametrize(("name", "load", "row", "prompt", "answers"), TRL, ids=[name for name, *_ in TRL])
def test_published_rows_are_read_as_they_are(
    name: str, load: Loader, row: dict[str, Json], prompt: str, answers: list[str], tmp_path: Path
) -> None:
    (group,) = load(section(write_rows(tmp_path / "t.jsonl", [row])), CHAT).train
    assert group.prompt.text == prompt
    assert list(group.texts) == answers


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "p", "completion": "a", "label": True}, {"prompt": "p", "completion": "b", "label": False}],
        [
            {"prompt": [SKY], "completion": [BLUE], "label": True},
            {"prompt": [SKY], "completion": [GREEN], "label": False},
        ],
        [{"prompt": [SKY], "chosen": [BLUE], "rejected": [GREEN]}],
        [{"chosen": "p a", "rejected": "p b"}],
    ],
)
def test_unpaired_preferences_and_pairs_are_labels(rows: list[Json], tmp_path: Path) -> None:
    good, bad = load_labeled(section(write_rows(tmp_path / "t.jsonl", rows)), CHAT).train
    assert (good.rewards[0].total, bad.rewards[0].total) == (1.0, 0.0)
    assert good.prompt.text == bad.prompt.text
    assert good.texts != bad.texts


@pytest.mark.parametrize(
    ("row", "text", "label"),
    [
        ({"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}, "1 + 1?", "1 + 1 = 2\n#### 2"),
        ({"prompt": [SKY], "solution": "blue"}, ASKED, "blue"),
        ({"context_messages": [SKY], "id": "a", "dataset": "d"}, ASKED, None),
        ({"input": "Hi", "datasource": "d"}, "Hi", None),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is", None),
    ],
)
def test_published_prompts_keep_their_label(row: Json, text: str, label: str | None, tmp_path: Path) -> None:
    (prompt,) = load_prompts(section(write_rows(tmp_path / "t.jsonl", [row])), CHAT, 200).train
    assert (prompt.text, prompt.label) == (text, label)


def test_a_conversation_beside_a_prompt_is_not_taken_for_it(tmp_path: Path) -> None:
    row: Json = {"prompt": "hi", "messages": [SKY, BLUE], "score": 1}
    (prompt,) = load_prompts(section(write_rows(tmp_path / "t.jsonl", [row])), PLAIN, 200).train
    assert (prompt.text, dict(prompt.metadata)) == ("hi", {"score": 1})
    (prompt,) = load_prompts(section(tmp_path / "t.jsonl", template="chat"), CHAT, 200).train
    assert prompt.metadata["messages"] == [{"role": "user", "content": "hi"}]
