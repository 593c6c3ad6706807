"""Rows with conversations: what they say is learned whole, refused by its row, or counted."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rlhf.cli.main import main
from rlhf.config.data import DataSection
from rlhf.engines.models.tokenizer import HfTokenizer
from rlhf.errors import DataError
from rlhf.orchestrator.data import load_prompts
from rlhf.types import Json, ScoredGroup
from tests.unit.engines.models.chat_tokenizers import chat_tokenizer, save_tokenizer, shipped_templates
from tests.unit.orchestrator.data.data_support import load_demonstrations, load_preferences, write_rows

TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CUTS_THOUGHTS = (
    "{% for m in messages %}{% set content = m.content %}{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL: dict[str, Json] = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"town": 0}},
}
TOOLS: list[Json] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"town": {"type": "integer"}}},
        },
    }
]
REPLY: dict[str, Json] = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "sunny"}
LAST: dict[str, Json] = {"role": "assistant", "content": "It is sunny in town 0."}


def user(text: str = "weather in town 0?") -> dict[str, Json]:
    return {"role": "user", "content": text}


def calling(content: Json = None, **changes: Json) -> dict[str, Json]:
    return {"role": "assistant", "content": content, "tool_calls": [CALL], **changes}


def said(text: Json, **more: Json) -> dict[str, Json]:
    return {"role": "assistant", "content": text, **more}


def tokenizer_of(template: str) -> HfTokenizer:
    return HfTokenizer(chat_tokenizer(template, ["<|im_start|>", "<|im_end|>"], bos="<bos>"))


def load(tmp_path: Path, rows: Sequence[dict[str, Json]], jinja: str, **section: object) -> tuple[ScoredGroup, ...]:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    return load_demonstrations(DataSection.model_validate({"path": str(path), **section}), tokenizer_of(jinja)).train


def learned(group: ScoredGroup, template: str) -> str:
    (response,) = group.responses
    mask = np.ones(len(response.token_ids), dtype=bool) if response.loss_mask is None else response.loss_mask
    return tokenizer_of(template).decode(response.token_ids[mask].tolist(), skip_special_tokens=False)


def refused(tmp_path: Path, row: dict[str, Json], jinja: str, **section: object) -> str:
    with pytest.raises(DataError) as error:
        load(tmp_path, [row], jinja, **section)
    (problem,) = error.value.problems
    return problem.partition("rows.jsonl:1: ")[2]


@pytest.mark.parametrize("content", ["I will look.", None, "", [{"type": "text", "text": "I will look."}]])
@pytest.mark.parametrize("arguments", [{"town": 0}, '{"town": 0}'])
def test_calls_and_tools_reach_the_template_and_calls_are_learned(
    content: Json, arguments: Json, tmp_path: Path
) -> None:
    call: Json = {"id": "c1", "function": {"name": "weather", "arguments": arguments}}
    messages: list[Json] = [user(), calling(content, tool_calls=[call]), REPLY, LAST]
    (group,) = load(tmp_path, [{"messages": messages, "tools": TOOLS}], TOOL_TEMPLATE)
    shown = "I will look." if content else ""
    function = json.dumps({"name": "weather", "arguments": {"town": 0}})
    assert learned(group, TOOL_TEMPLATE) == (
        f"{shown}<call>{function}</call><|im_end|>It is sunny in town 0.<|im_end|>"
    )
    assert f"<|im_start|>system\n{json.dumps(TOOLS)}" in group.prompt.text


def test_tools_may_be_json_text(tmp_path: Path) -> None:
    row: dict[str, Json] = {"messages": [user(), LAST], "tools": json.dumps(TOOLS)}
    (group,) = load(tmp_path, [row], TOOL_TEMPLATE)
    assert json.dumps(TOOLS) in group.prompt.text


def test_prompts_are_rendered_with_tools_and_calls_and_keep_them(tmp_path: Path) -> None:
    messages: list[Json] = [user(), calling(), REPLY]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": messages, "tools": TOOLS}])
    (prompt,) = load_prompts(DataSection(path=str(path)), tokenizer_of(TOOL_TEMPLATE), 1000).train
    assert "<call>" in prompt.text
    assert json.dumps(TOOLS) in prompt.text
    assert prompt.metadata["tools"] == TOOLS
    kept = prompt.metadata["messages"]
    assert isinstance(kept, list)
    assert kept[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


THINKING = said("<think>\nI add two to 0.\n</think>\n\n2")


@pytest.mark.parametrize(
    ("template", "row", "complaint"),
    [
        (
            CUTS_THOUGHTS,
            {"messages": [user(), THINKING]},
            "the chat template leaves out part of messages[1] (its content).",
        ),
        (
            TOOL_TEMPLATE,
            {"messages": [user(), said("2", reasoning_content="I add two to 0.")]},
            "the chat template leaves out part of messages[1] (its reasoning_content).",
        ),
        (
            CUTS_THOUGHTS,
            {"messages": [user(), calling("I will look."), REPLY, LAST]},
            "the chat template leaves out part of messages[1] (its tool_calls[0]).",
        ),
        (CUTS_THOUGHTS, {"messages": [user(), LAST], "tools": TOOLS}, "the chat template leaves out tools[0]."),
        (
            TOOL_TEMPLATE.replace("{{ m.content or '' }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}"),
            {"messages": [user(), calling("I will look."), REPLY, LAST]},
            "the chat template leaves out part of messages[1] (its content).",
        ),
        (
            CUTS_THOUGHTS.replace("{{ content }}", "{{ content[:20] }}"),
            {"messages": [user(), said("a longer answer than that")]},
            "the chat template leaves out part of messages[1] (its content).",
        ),
        (
            CUTS_THOUGHTS.replace("= m.content %}", "= m.content if m.role != 'system' else '' %}"),
            {"messages": [{"role": "system", "content": "Be kind."}, user(), LAST]},
            "the chat template leaves out part of messages[0] (its content).",
        ),
        (
            CUTS_THOUGHTS.replace("{{ content }}", "{{ content if content != '4' else '' }} (4)"),
            {"messages": [user(), said("5"), user("and?"), said("4")]},
            "",
        ),
        (
            TOOL_TEMPLATE.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]"),
            {"messages": [user(), calling(tool_calls=[CALL, {"name": "f", "arguments": {"n": 3}}]), REPLY, LAST]},
            "the chat template leaves out part of messages[1] (its tool_calls[1]).",
        ),
        (
            TOOL_TEMPLATE.replace("call.function | tojson", "call.function.name"),
            {"messages": [user(), calling(), REPLY, LAST]},
            "the chat template leaves out part of messages[1] (its tool_calls[0]).",
        ),
    ],
)  # fmt: skip
def test_a_row_that_a_template_does_not_show_whole_is_refused(
    template: str, row: dict[str, Json], complaint: str, tmp_path: Path
) -> None:
    if complaint:
        assert refused(tmp_path, row, template) == complaint
    else:
        assert load(tmp_path, [row], template)


def test_a_short_answer_that_occurs_elsewhere_is_not_taken_for_shown(tmp_path: Path) -> None:
    template = CUTS_THOUGHTS.replace("{{ content }}", "{{ '' if m.role == 'assistant' else content }}assist")
    complaint = "the chat template leaves out part of messages[1] (its content)."
    assert refused(tmp_path, {"messages": [user(), said("a")]}, template) == complaint


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (said(None), "messages[1].content is empty, and there are no tool_calls."),
        (said(None, tool_calls=[]), "messages[1].content is empty, and there are no tool_calls."),
        (calling(tool_calls="x"), "messages[1].tool_calls is not a list of calls (got str)."),
        (calling(tool_calls=[3]), "messages[1].tool_calls[0] is not a call (got int)."),
        (calling(tool_calls=[{"function": {}}]), "messages[1].tool_calls[0] has no function name."),
        (
            calling(tool_calls=[{"function": {"name": "f", "arguments": [1]}}]),
            "messages[1].tool_calls[0]: arguments must be an object or text (got list).",
        ),
        (
            calling(tool_calls=[{"function": {"name": "f", "arguments": {"a": "\x00"}}}]),
            "messages[1].tool_calls[0] holds a NUL byte.",
        ),
        (
            said("x", function_call={"name": "f", "arguments": "{}"}),
            "messages[1] holds function_call, an old form; write it as tool_calls.",
        ),
        (said("x", reasoning_content=3), "messages[1].reasoning_content is not text (got int)."),
        (
            said("x", reasoning_content="a", thinking="b"),
            "messages[1] holds reasoning_content and thinking, which differ.",
        ),
        (
            {"role": "user", "content": "x", "tool_calls": [CALL]},
            "messages[1] holds tool_calls, which only an assistant's message may.",
        ),
        (said([{"type": "image"}]), "messages[1].content holds parts that are not text."),
    ],
)
def test_a_message_that_cannot_be_read_is_named(message: dict[str, Json], complaint: str, tmp_path: Path) -> None:
    assert refused(tmp_path, {"messages": [user(), message]}, TOOL_TEMPLATE) == complaint


@pytest.mark.parametrize(
    ("tools", "complaint"),
    [
        ("[", "tools is text that is no JSON."),
        ({"a": 1}, "tools is not a list of tools (got dict)."),
        ([{"type": "function"}], "tools[0] is not a tool with a name."),
        ([{"name": "f"}, "g"], "tools[1] is not a tool with a name."),
    ],
)
def test_tools_that_cannot_be_read_are_named(tools: Json, complaint: str, tmp_path: Path) -> None:
    assert refused(tmp_path, {"messages": [user(), LAST], "tools": tools}, TOOL_TEMPLATE) == complaint


def test_a_column_tools_beside_texts_is_a_column_like_any_other(tmp_path: Path) -> None:
    (group,) = load(tmp_path, [{"prompt": "a", "response": "b", "tools": "hammer"}], TOOL_TEMPLATE)
    assert group.prompt.metadata["tools"] == "hammer"


def test_what_plain_texts_cannot_hold_is_refused(tmp_path: Path) -> None:
    row: dict[str, Json] = {"prompt": [user()], "response": [calling("I look.")]}
    complaint = "response[0] holds tool_calls, which need data.template=chat."
    assert refused(tmp_path, row, TOOL_TEMPLATE, template="plain") == complaint
    row = {"prompt": [user()], "response": [LAST], "tools": TOOLS}
    assert refused(tmp_path, row, TOOL_TEMPLATE, template="plain") == "tools need data.template=chat."


@pytest.mark.parametrize("key", ["tool_calls", "tools", "reasoning_content"])
def test_control_tokens_are_refused_in_every_field(key: str, tmp_path: Path) -> None:
    bad = "x<|im_end|>"
    message = said("x", reasoning_content=bad) if key == "reasoning_content" else LAST
    if key == "tool_calls":
        message = calling("x", tool_calls=[{"function": {"name": "f", "arguments": {bad: 1}}}])
    row: dict[str, Json] = {"messages": [user(), message]}
    if key == "tools":
        row["tools"] = [{"name": "f", "description": bad}]
    assert "holds the control token <|im_end|>" in refused(tmp_path, row, TOOL_TEMPLATE)


def test_keys_that_nothing_reads_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[dict[str, Json]] = [
        {"messages": [{**user(f"hi {n}"), "weight": 1, "audio": None}, {**LAST, "mood": "good"}]} for n in range(3)
    ]
    with caplog.at_level(logging.WARNING):
        load(tmp_path, rows, TOOL_TEMPLATE)
    told = [message for message in caplog.messages if "nothing read" in message]
    assert told == ["keys of messages that nothing read: messages[].weight, messages[].mood."]


CHAT: list[Json] = [
    user("first question"),
    said("first answer", reasoning_content="first thought"),
    user("second question"),
    said("second answer", reasoning_content="second thought"),
]
INLINE: list[Json] = [
    user("first question"),
    said("<think>\nfirst thought\n</think>\n\nfirst answer"),
    user("second question"),
    said("<think>\nsecond thought\n</think>\n\nsecond answer"),
]


@pytest.mark.parametrize("family", ["qwen3", "glm4moe", "deepseek_r1_distill", "gptoss", "nemotron_3_nano"])
@pytest.mark.parametrize("messages", [CHAT, INLINE], ids=["field", "inline"])
def test_where_a_template_cuts_thoughts_of_history_each_turn_is_learned_whole(
    family: str, messages: list[Json], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = shipped_templates()[f"trl/{family}"]
    with caplog.at_level(logging.WARNING):
        first, second = load(tmp_path, [{"messages": messages}], template)
    for group, words in ((first, "first"), (second, "second")):
        text = learned(group, template)
        assert text.index(f"{words} thought") < text.index(f"{words} answer")
        assert text.count("thought") == 1
    assert "first answer" in second.prompt.text
    kept = family == "gptoss" and messages is INLINE
    assert ("first thought" in second.prompt.text) == kept
    assert [first.prompt.id, second.prompt.id] == ["rows.jsonl:1#1", "rows.jsonl:1#3"]
    told = " ".join(caplog.messages)
    assert "1 conversation: the chat template rewrites earlier turns" in told
    assert ("1 conversation: the chat template leaves out what the assistant thought in earlier" in told) != kept


@pytest.mark.parametrize("family", ["phi3", "qwen3", "phi3_5"])
def test_turns_of_a_template_that_ends_conversations_are_learned_one_by_one(family: str, tmp_path: Path) -> None:
    template = shipped_templates()[f"trl/{family}"]
    messages: list[Json] = [user("hi"), said("hello"), user("bye"), said("see you")]
    first, second = load(tmp_path, [{"messages": messages}], template)
    assert learned(first, template).endswith(("hello<|end|>", "hello<|im_end|>"))
    assert learned(second, template).endswith(("see you<|end|>", "see you<|im_end|>"))


def test_turns_of_one_conversation_stay_on_one_side_of_the_split(tmp_path: Path) -> None:
    template = shipped_templates()["trl/phi3"]
    rows: list[dict[str, Json]] = [
        {"messages": [user(f"hi {n}"), said("hello"), user("bye"), said("see you")]} for n in range(12)
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    split = load_demonstrations(DataSection(path=str(path), eval_fraction=0.3), tokenizer_of(template))
    sides = [{group.prompt.id.partition("#")[0] for group in side} for side in (split.train, split.held_out)]
    assert not sides[0] & sides[1]
    assert len(split.train) + len(split.held_out) == 24


def test_thoughts_are_learned_in_pairs_and_a_pair_without_them_is_refused_where_they_are_open(tmp_path: Path) -> None:
    template = shipped_templates()["trl/deepseek_r1_distill"]
    row: dict[str, Json] = {
        "prompt": [user("2 + 0?")],
        "chosen": [THINKING],
        "rejected": [said("<think>\nI guess.\n</think>\n\n3")],
    }
    path = write_rows(tmp_path / "rows.jsonl", [row])
    (group,) = load_preferences(DataSection(path=str(path)), tokenizer_of(template)).train
    decoded = [
        tokenizer_of(template).decode(response.token_ids.tolist(), skip_special_tokens=False)
        for response in group.responses
    ]
    end = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    assert decoded == [f"I add two to 0.\n</think>\n\n2{end}", f"I guess.\n</think>\n\n3{end}"]
    assert group.prompt.text.endswith("<think>\n")
    path = write_rows(tmp_path / "rows.jsonl", [{**row, "rejected": [said("3")]}])
    with pytest.raises(
        DataError, match=r"opens the thoughts of messages\[1\], which has none; set data\.chat_template"
    ):
        load_preferences(DataSection(path=str(path)), tokenizer_of(template))


def test_the_report_counts_what_templates_leave_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = shipped_templates()["trl/qwen3"]
    folder = save_tokenizer(chat_tokenizer(template), tmp_path / "tokenizer")
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": CHAT}])
    assert main(["data", "demonstrations", "--data.path", str(path), "--tokenizer", folder, "--json"]) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert any("rewrites earlier turns" in line for line in warnings)
    assert any("leaves out what the assistant thought" in line for line in warnings)


def test_the_report_ends_with_3_where_an_answer_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tokenizer(chat_tokenizer(CUTS_THOUGHTS), tmp_path / "tokenizer")
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [user(), THINKING]}])
    assert main(["data", "demonstrations", "--data.path", str(path), "--tokenizer", folder]) == 3
    assert "rows.jsonl:1: the chat template leaves out part of messages[1]" in capsys.readouterr().err
