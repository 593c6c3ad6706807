"""Calls in what a model wrote."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.environments.calls import Call, UnreadCall, find_format, parse_hermes, parse_llama
from rlhf.environments.conversation import rewritten_turn
from rlhf.errors import ModelError
from rlhf.types import Json
from tests.tiny_models import CHAT_TEMPLATE
from tests.unit.environments.support import HERMES, LLAMA, byte_tokenizer

TOOLS: list[Json] = [{"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {}}}]
VALUES: st.SearchStrategy[Json] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.text(min_size=1, max_size=9), st.dictionaries(st.text(), VALUES, max_size=3)), max_size=3))
def test_calls_are_read_as_they_were_written(calls: list[tuple[str, dict[str, Json]]]) -> None:
    tags = ("<tool_call>", "</tool_call>", "</think>")
    texts = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    if any(tag in text for tag in tags for text in texts):
        return
    whole = "Let me see." + "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)
    assert parse_hermes(whole) == [Call(name=name, arguments=arguments) for name, arguments in calls]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<tool_call>{'name': 'add'}</tool_call>", "the call is no JSON"),
        ("<tool_call>[1]</tool_call>", "the call is no object"),
        ('<tool_call>{"arguments": {}}</tool_call>', "the call is no object"),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "the arguments of add are no JSON object"),
        ('<tool_call>{"name": "add", "arguments": "x"}</tool_call>', "the arguments of add are no JSON object"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1', "the call is no JSON"),
        ("<tool_call>" + "[" * 100_000, "the call is no JSON"),
        ('<tool_call>{"name": "add", "arguments": {"a": ' + "9" * 6000 + "}}", "the call is no JSON"),
    ],
)
def test_what_is_no_call_says_why(text: str, why: str) -> None:
    (call,) = parse_hermes(text)
    assert isinstance(call, UnreadCall)
    assert call.why.startswith(why)


def test_calls_in_thoughts_are_not_made() -> None:
    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    assert parse_hermes(f"<think>I could {call}</think>\n\nNo.") == []
    assert parse_hermes(f"<think>I will.</think>{call}") == [Call(name="add", arguments={})]


def test_the_last_call_may_lack_its_end_and_arguments_may_be_text() -> None:
    assert parse_hermes('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}') == [
        Call(name="add", arguments={"a": 1})
    ]


def test_llama_calls_are_the_whole_turn() -> None:
    assert parse_llama('<|python_tag|>{"name": "add", "parameters": {"a": 1}}') == [
        Call(name="add", arguments={"a": 1})
    ]
    assert parse_llama('I call {"name": "add", "parameters": {}}') == []
    assert parse_llama('{"answer": 4}') == []
    assert isinstance(parse_llama('{"name": add}')[0], UnreadCall)


def test_the_form_is_that_of_the_chat_template() -> None:
    assert find_format(byte_tokenizer(HERMES), TOOLS).read is parse_hermes
    assert find_format(byte_tokenizer(LLAMA), TOOLS).read is parse_llama


def test_a_template_without_calls_or_with_unknown_ones_is_refused() -> None:
    with pytest.raises(ModelError, match=r"^rollout\.tools: the chat template writes no calls"):
        find_format(byte_tokenizer(CHAT_TEMPLATE), TOOLS)
    other = HERMES.replace("<tool_call>", "<call>").replace("</tool_call>", "</call>")
    with pytest.raises(ModelError, match=r"a form that is not read here \(<call> .*Those of Hermes and Qwen, Llama 3"):
        find_format(byte_tokenizer(other), TOOLS)


def test_a_template_that_rewrites_answers_is_known() -> None:
    assert not rewritten_turn(byte_tokenizer(HERMES), TOOLS, "tool")
    assert not rewritten_turn(byte_tokenizer(LLAMA), TOOLS, "user")
    rewriting = HERMES.replace(
        "message.content + '<|im_end|>", "(message.content if loop.last else '...') + '<|im_end|>"
    )
    assert rewritten_turn(byte_tokenizer(rewriting), TOOLS, "user").startswith("it writes '...")
    refusing = HERMES.replace(
        "{%- if message.role == 'tool' %}", "{%- if message.role == 'tool' %}{{ raise_exception('no tools') }}"
    )
    with pytest.raises(ModelError, match=r"takes no tool message after an answer: .*no tools"):
        rewritten_turn(byte_tokenizer(refusing), TOOLS, "tool")
