"""Calls in what a model wrote."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.environments.calls import Call, Parser, Said, UnreadCall
from rlhf.environments.formats.gemma import read_gemma
from rlhf.environments.formats.harmony import read_harmony
from rlhf.environments.formats.json_calls import read_deepseek, read_hermes, read_llama, read_mistral
from rlhf.environments.formats.known import find_format, rewritten_turn
from rlhf.environments.formats.tagged import read_glm, read_qwen
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
@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=9).filter(str.strip), st.dictionaries(st.text(), VALUES, max_size=3)),
        max_size=3,
    )
)
def test_calls_are_read_as_they_were_written(calls: list[tuple[str, dict[str, Json]]]) -> None:
    tags = ("<tool_call>", "</tool_call>", "</think>")
    texts = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    if any(tag in text for tag in tags for text in texts):
        return
    whole = "Let me see." + "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in texts)
    assert read_hermes(whole, ()).calls == tuple(Call(name=name, arguments=arguments) for name, arguments in calls)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<tool_call>{'name': 'add'}</tool_call>", "the call is no JSON"),
        ("<tool_call>[1]</tool_call>", "the call is no object"),
        ('<tool_call>{"arguments": {}}</tool_call>', "the call is no object"),
        ('<tool_call>{"name": " ", "arguments": {}}</tool_call>', "the call has no name of a function"),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', "the arguments of add are no JSON object"),
        ('<tool_call>{"name": "add", "arguments": "x"}</tool_call>', "the arguments of add are no JSON object"),
        ('<tool_call>{"name": "add", "arguments": {"a": 1', "the call is no JSON"),
        ("<tool_call>" + "[" * 100_000, "the call is no JSON"),
        ('<tool_call>{"name": "add", "arguments": {"a": ' + "9" * 6000 + "}}", "the call is no JSON"),
    ],
)
def test_what_is_no_call_says_why(text: str, why: str) -> None:
    (call,) = read_hermes(text, ()).calls
    assert isinstance(call, UnreadCall)
    assert call.why.startswith(why)


def test_calls_in_thoughts_are_not_made() -> None:
    call = '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    assert read_hermes(f"<think>I could {call}</think>\n\nNo.", ()).calls == ()
    assert read_hermes(f"<think>I will.</think>{call}", ()).calls == (Call(name="add", arguments={}),)


def test_the_last_call_may_lack_its_end_and_arguments_may_be_text() -> None:
    said = read_hermes('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}', ())
    assert said.calls == (Call(name="add", arguments={"a": 1}),)


def test_llama_calls_are_the_whole_turn() -> None:
    said = read_llama('<|python_tag|>{"name": "add", "parameters": {"a": 1}}', ())
    assert said.calls == (Call(name="add", arguments={"a": 1}),)
    assert read_llama('I call {"name": "add", "parameters": {}}', ()).calls == ()
    assert read_llama('{"answer": 4}', ()).calls == ()
    assert isinstance(read_llama('{"name": add}', ()).calls[0], UnreadCall)


@pytest.mark.parametrize(
    ("read", "text", "why"),
    [
        (read_mistral, "[TOOL_CALLS]add[ARGS]{", "the arguments of add are no JSON object"),
        (read_mistral, "[TOOL_CALLS]add", "the call is no name with a JSON object"),
        (read_mistral, '[TOOL_CALLS] [{"name": "add"', "the calls are no JSON"),
        (read_mistral, "[TOOL_CALLS] []", "the list of calls is empty"),
        (read_deepseek, "<@tool▁calls▁begin@><@tool▁call▁begin@>add<@tool▁sep@>{", "the arguments of add are no JSON"),
        (read_qwen, "<tool_call>\n<function>\n</tool_call>", "the call has no name of a function"),
        (read_glm, "<tool_call>\n</tool_call>", "the call has no name of a function"),
        (read_gemma, "<|tool_call>add{}<tool_call|>", "the call is not of the form call:name"),
        (read_gemma, "<|tool_call>call:add{a:}<tool_call|>", "the arguments of add cannot be read"),
        (read_harmony, " to=functions.add<|channel|>commentary json<|message|>1", "the arguments of add are no JSON"),
    ],
)
def test_what_is_no_call_in_other_forms_says_why(read: Parser, text: str, why: str) -> None:
    (call,) = read(text.replace("@", "\uff5c"), ()).calls
    assert isinstance(call, UnreadCall)
    assert call.why.startswith(why)


@pytest.mark.parametrize(
    ("read", "text", "said"),
    [
        (
            read_harmony,
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.add "
            '<|constrain|>json<|message|>{"a":1}',
            Said(text="", calls=(Call(name="add", arguments={"a": 1}),), thoughts="Hm."),
        ),
        (
            read_harmony,
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Four.",
            Said(text="Four.", thoughts="Hm."),
        ),
        (
            read_deepseek,
            "Hm.</think>So:<@tool▁calls▁begin@><@tool▁call▁begin@>function<@tool▁sep@>add\n```json\n"
            '{"a": 1}\n```<@tool▁call▁end@><@tool▁calls▁end@>',
            Said(text="So:", calls=(Call(name="add", arguments={"a": 1}),), thoughts="Hm."),
        ),
        (
            read_mistral,
            '[THINK]Hm.[/THINK][TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "abcdefghi"}]',
            Said(text="", calls=(Call(name="add", arguments={"a": 1}),), thoughts="Hm."),
        ),
        (
            read_mistral,
            '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]add[ARGS]{"a": 2}',
            Said(text="", calls=tuple(Call(name="add", arguments={"a": n}) for n in (1, 2))),
        ),
        (
            read_gemma,
            'So.<|tool_call>call:add{a:1,b:{<|"|>c, d:<|"|>:[true,<|"|>{x:1}<|"|>]}}<tool_call|>',
            Said(text="So.", calls=(Call(name="add", arguments={"a": 1, "b": {"c, d:": [True, "{x:1}"]}}),)),
        ),
    ],
)
def test_turns_are_taken_apart(read: Parser, text: str, said: Said) -> None:
    assert read(text.replace("@", "\uff5c"), ()) == said


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "integer"}, "5", 5),
        ({"type": ["string", "null"]}, "5", "5"),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, "5", 5),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "None", None),
        ({"type": "number"}, "5", 5),
        ({"type": "boolean"}, "True", True),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"type": "array"}, '["a"]', ["a"]),
        ({"type": "integer"}, "five", "five"),
        ({}, "5", 5),
    ],
)
def test_an_untyped_argument_has_the_type_of_its_schema(schema: Json, text: str, value: Json) -> None:
    parameters: Json = {"type": "object", "properties": {"a": schema}}
    tools: list[Json] = [{"type": "function", "function": {"name": "add", "parameters": parameters}}]
    written = f"<tool_call>\n<function=add>\n<parameter=a>\n{text}\n</parameter>\n</function>\n</tool_call>"
    (call,) = read_qwen(written, tools).calls
    assert call == Call(name="add", arguments={"a": value})
    (call,) = read_glm(
        f"<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>", tools
    ).calls
    assert call == Call(name="add", arguments={"a": value})


def test_the_form_is_that_of_the_chat_template() -> None:
    assert find_format(byte_tokenizer(HERMES), TOOLS).read is read_hermes
    assert find_format(byte_tokenizer(LLAMA), TOOLS).read is read_llama


def test_a_template_without_calls_or_with_unknown_ones_is_refused() -> None:
    with pytest.raises(ModelError, match=r"^rollout\.tools: the chat template writes no calls"):
        find_format(byte_tokenizer(CHAT_TEMPLATE), TOOLS)
    other = HERMES.replace("<tool_call>", "<call>").replace("</tool_call>", "</call>")
    with pytest.raises(ModelError, match=r"a form that is not read here \(<call> .*Those of Hermes and Qwen 3, "):
        find_format(byte_tokenizer(other), TOOLS)


def test_a_template_that_rewrites_answers_is_known() -> None:
    assert not rewritten_turn(byte_tokenizer(HERMES), TOOLS, "tool")
    assert not rewritten_turn(byte_tokenizer(LLAMA), TOOLS, "user")
    rewriting = HERMES.replace(
        "message.content + '<|im_end|>",
        "(message.content if loop.last or message.role == 'user' else '...') + '<|im_end|>",
    )
    assert rewritten_turn(byte_tokenizer(rewriting), TOOLS, "user").startswith("it writes '...")
    refusing = HERMES.replace(
        "{%- if message.role == 'tool' %}", "{%- if message.role == 'tool' %}{{ raise_exception('no tools') }}"
    )
    with pytest.raises(ModelError, match=r"takes no tool message after an answer: .*no tools"):
        rewritten_turn(byte_tokenizer(refusing), TOOLS, "tool")
