"""What nothing reads of a data set is named: columns, and keys of messages. Text that holds messages, and a system
message in a column of its own, are used or refused."""

import json
import logging
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.cli.data_report import run_data_report
from rlhf.config.commands import RowKind
from rlhf.config.tools import DataConfig
from rlhf.conversations.messages import READ_KEYS
from rlhf.errors import DataError
from rlhf.orchestrator.data import check_rows, load_prompts
from rlhf.types import Json
from tests.unit.orchestrator.data.data_support import (
    CHAT,
    PLAIN,
    complaints,
    load_demonstrations,
    load_preferences,
    load_steps,
    section,
    write_rows,
)

Row = dict[str, Json]
OTHER: Json = {"role": "assistant", "content": "c"}
ASK: Json = {"role": "user", "content": "a"}
SAY: Json = {"role": "assistant", "content": "b"}
CALL: Json = {"role": "assistant", "content": "b", "weight": 1, "name": None, "audio": ""}
PARTS: Json = {"role": "user", "content": [{"type": "text", "text": "a", "cache": True}]}


def lines_of(path: Path, kind: RowKind, rows: list[Row], **keys: object) -> list[str]:
    rows_read = check_rows(section(write_rows(path / "t.jsonl", rows), **keys), kind)
    return [line for unread in rows_read.unread for line in unread.lines(None)]


NOTHING_READ = "columns that nothing read: "
UNREAD: list[tuple[RowKind, Row, list[str]]] = [
    (RowKind.DEMONSTRATIONS, {"prompt": "a", "response": "b", "id": "1"}, []),
    (RowKind.DEMONSTRATIONS, {"prompt": "a", "response": "b", "x": 0, "y": False}, [NOTHING_READ + "x, y."]),
    (RowKind.DEMONSTRATIONS, {"prompt": "a", "response": "b", "x": None, "y": "", "z": [], "w": {}}, []),
    (RowKind.DEMONSTRATIONS, {"instruction": "a", "input": "c", "output": "b"}, []),
    (RowKind.DEMONSTRATIONS, {"prompt": "a", "input": "c", "output": "b"}, ["columns that nothing read: input."]),
    (RowKind.DEMONSTRATIONS, {"prompt": "a", "response": "b", "output": "c"}, ["columns that nothing read: output."]),
    (RowKind.DEMONSTRATIONS, {"messages": [ASK, SAY], "answer": "c"}, ["columns that nothing read: answer."]),
    (RowKind.DEMONSTRATIONS, {"prompt": "a", "chosen": "b", "rejected": "c"}, ["columns that nothing read: rejected."]),
    (RowKind.DEMONSTRATIONS, {"messages": [ASK, CALL]}, ["keys of messages that nothing read: messages[].weight."]),
    (
        RowKind.DEMONSTRATIONS,
        {"prompt": [PARTS], "response": [CALL], "tags": [{"type": "function"}]},
        [
            "columns that nothing read: tags.",
            "keys of messages that nothing read: prompt[].content[].cache, response[].weight.",
        ],
    ),
    (RowKind.PREFERENCES, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1}, []),
    (
        RowKind.PREFERENCES,
        {"prompt": "a", "chosen": "b", "rejected": "c", "ranking": ["b", "c"]},
        ["columns that nothing read: ranking."],
    ),
    (RowKind.PREFERENCES, {"prompt": "a", "ranking": ["b", "c"], "score": 1}, ["columns that nothing read: score."]),
    (RowKind.PREFERENCES, {"prompt": "a", "chosen": [ASK, SAY], "rejected": [ASK, OTHER]}, []),
    (
        RowKind.PREFERENCES,
        {"prompt": "another", "chosen": [ASK, SAY], "rejected": [ASK, OTHER]},
        ["columns that nothing read: prompt."],
    ),
    (RowKind.LABELED, {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1}, [NOTHING_READ + "margin."]),
    (RowKind.STEPS, {"prompt": "a", "completions": ["b"], "labels": [True]}, []),
    (RowKind.STEPS, {"prompt": "a", "completions": ["b"], "labels": [True], "label": 1}, [NOTHING_READ + "label."]),
    (RowKind.TEXTS, {"text": "a", "system": "b"}, ["columns that nothing read: system."]),
    (RowKind.PROMPTS, {"prompt": "a", "label": "b"}, []),
    (
        RowKind.PROMPTS,
        {"prompt": "a", "label": "b", "answer": "c", "chosen": "d"},
        [
            "columns that nothing read: chosen.",
            "columns that nothing read, unless a reward or environment does: answer.",
        ],
    ),
    (RowKind.PROMPTS, {"prompt": "a", "messages": [ASK, SAY]}, ["columns that nothing read: messages."]),
    (RowKind.PROMPTS, {"chosen": [ASK, SAY], "rejected": [ASK, OTHER]}, []),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "lines"), UNREAD)
def test_what_nothing_reads_is_named(tmp_path: Path, kind: RowKind, row: Row, lines: list[str]) -> None:
    assert lines_of(tmp_path, kind, [row]) == lines


def test_what_the_reward_reads_is_not_unread(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"prompt": "a", "tests": "assert f()", "topic": "x"}])
    (unread,) = (unread for unread in check_rows(section(path), RowKind.PROMPTS).unread if unread.columns)
    assert unread.lines({"tests"}) == ["columns that nothing read: topic."]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.text("abcxyz_", min_size=1, max_size=3), st.integers(), max_size=3),
    st.dictionaries(st.text("abcxyz_", min_size=1, max_size=3), st.integers(), max_size=3),
)
def test_every_column_and_key_is_read_or_named(tmp_path: Path, columns: Row, keys: Row) -> None:
    message = {"role": "user", "content": "a", **keys}
    lines = lines_of(tmp_path, RowKind.DEMONSTRATIONS, [{"prompt": [message], "response": "b", **columns}])
    expected = [f"columns that nothing read: {', '.join(columns)}."] if columns else []
    others = [f"prompt[].{key}" for key in keys if key not in READ_KEYS]
    assert lines == expected + ([f"keys of messages that nothing read: {', '.join(others)}."] if others else [])


def test_the_report_and_a_run_say_what_nothing_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"prompt": "a", "response": "b", "source": "web"}])
    run_data_report(DataConfig(kind=RowKind.DEMONSTRATIONS, data=section(path), as_json=True))
    assert json.loads(capsys.readouterr().out)["warnings"] == ["columns that nothing read: source."]
    caplog.set_level(logging.WARNING)
    load_demonstrations(section(path), PLAIN)
    assert caplog.messages == ["columns that nothing read: source."]


MESSAGES = json.dumps([ASK])


@pytest.mark.parametrize(
    "text", [MESSAGES, f" {MESSAGES}\n", '[{"from": "human", "value": "a"}]', '[ {\n"content": "a", "role": "user"}]']
)
def test_text_that_is_a_list_of_messages_is_read_as_messages(tmp_path: Path, text: str) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"prompt": text}])
    (prompt,) = load_prompts(section(path), CHAT, 100).train
    assert prompt.text == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_responses_as_text_are_read_as_messages_too(tmp_path: Path) -> None:
    worse = json.dumps([ASK, {"role": "assistant", "content": "c"}])
    path = write_rows(tmp_path / "t.jsonl", [{"chosen": json.dumps([ASK, SAY]), "rejected": worse}])
    (group,) = load_preferences(section(path), CHAT).train
    assert group.texts == ("b", "c")


@pytest.mark.parametrize(
    "text", ["[{'role': 'user', 'content': 'a'}]", "[{'content': 'a', 'role': 'user'}\n {'from': 'b'}] "]
)
def test_messages_in_pythons_notation_are_refused_by_name(tmp_path: Path, text: str) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"prompt": text}])
    with pytest.raises(DataError) as error:
        load_prompts(section(path), CHAT, 100)
    assert complaints(error) == [
        "t.jsonl:1: prompt is text that holds messages in Python's notation; write them as JSON."
    ]


@pytest.mark.parametrize(
    "text", [f"{MESSAGES} Sum this up.", '[{"role": "user", "content": ', '[{"a": 1}]', "[{'role': 'x'}] is it?", "[1]"]
)
def test_other_text_stays_text(tmp_path: Path, text: str) -> None:
    (prompt,) = load_prompts(section(write_rows(tmp_path / "t.jsonl", [{"prompt": text}])), CHAT, 100).train
    assert prompt.text == text


SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
ASKED = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "question": "a"},
        {"system_prompt": "Be brief.", "prompt": [ASK]},
        {"system": "Be brief.", "prompt": [{"role": "system", "content": "Be brief. "}, ASK]},
        {"persona": "Be brief.", "prompt": "a"},
    ],
)
def test_a_system_message_beside_the_prompt_stands_before_it(tmp_path: Path, row: Row) -> None:
    keys = {"system_key": "persona"} if "persona" in row else {}
    (prompt,) = load_prompts(section(write_rows(tmp_path / "t.jsonl", [row]), **keys), CHAT, 100).train
    assert prompt.text.replace("brief. <", "brief.<") == SYSTEM + ASKED


def test_a_system_message_is_used_by_every_kind_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write_rows(path, [{"system": "Be brief.", "prompt": "a", "response": "b"}])
    (group,) = load_demonstrations(section(path), CHAT).train
    assert (group.prompt.text, group.texts) == (SYSTEM + ASKED, ("b",))
    write_rows(path, [{"system": "Be brief.", "chosen": [ASK, SAY], "rejected": [ASK, OTHER]}])
    (group,) = load_preferences(section(path), CHAT).train
    assert (group.prompt.text, group.texts) == (SYSTEM + ASKED, ("b", "c"))
    write_rows(path, [{"system": "Be brief.", "prompt": "a", "completions": ["b"], "labels": [True]}])
    (group,) = load_steps(section(path), CHAT).train
    assert (group.prompt.text, group.texts) == (SYSTEM + ASKED, ("b\n",))
    write_rows(
        path,
        [{"system": "Be brief.", "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}],
    )
    (group,) = load_preferences(section(path), CHAT).train
    assert (group.prompt.text, group.texts) == (SYSTEM + ASKED, ("b", "c"))


def test_without_a_chat_template_the_system_message_is_a_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"system": "Be brief.", "prompt": "a"}])
    (prompt,) = load_prompts(section(path, template="plain"), PLAIN, 100).train
    assert prompt.text == "Be brief.\na"


@pytest.mark.parametrize("value", [None, "", 3, {"name": "x"}])
def test_a_column_that_holds_no_system_message_changes_nothing(tmp_path: Path, value: Json) -> None:
    (prompt,) = load_prompts(
        section(write_rows(tmp_path / "t.jsonl", [{"system": value, "prompt": "a"}])), CHAT, 100
    ).train
    assert prompt.text == "a"


def test_two_different_system_messages_are_refused(tmp_path: Path) -> None:
    row = {"system": "Be brief.", "prompt": [{"role": "system", "content": "Be long."}, ASK]}
    with pytest.raises(DataError) as error:
        load_prompts(section(write_rows(tmp_path / "t.jsonl", [row])), CHAT, 100)
    assert complaints(error) == ["t.jsonl:1: system is not the system message of prompt; leave one of them out."]
    with pytest.raises(DataError) as error:
        load_prompts(section(write_rows(tmp_path / "t.jsonl", [{"x": 3, "prompt": "a"}]), system_key="x"), CHAT, 100)
    assert complaints(error) == ["t.jsonl:1: x is not text (got int)."]
