"""Prompts for `rlhf generate`: made as in the run that trained the model."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from rlhf.config.data import DataSection
from rlhf.config.tools import GenerateConfig
from rlhf.engines.fakes import FakeTokenizer
from rlhf.errors import ConfigError
from rlhf.launch.data import RunData
from rlhf.launch.generate import read_prompts, style_of
from rlhf.launch.trained_model import prompt_style, remember_prompts
from rlhf.orchestrator.data import load_prompts
from rlhf.types import Json, Message


class Tokenizer(FakeTokenizer):
    """Its chat template puts a turn into square brackets."""

    def __init__(self, has_chat_template: bool) -> None:
        super().__init__("abc[]<>")
        self.has_chat_template = has_chat_template

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[Json] = ()) -> str:
        return "".join(f"[{message.content}]" for message in messages)


def a_run(folder: Path, **data: object) -> str:
    """A finished run with these settings of its data; returns its model's folder."""
    (folder / "model").mkdir()
    (folder / "status.json").write_text("{}")
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"path": "rows.jsonl", **data}, "policy": {"lr": 1.0}}))
    return str(folder / "model")


def prompt_for(model: str, *, has_chat_template: bool = True, **given: str) -> str:
    config = GenerateConfig.model_validate({"model": model, "prompt": ("abc",), **given})
    (prompt,) = read_prompts(config, Tokenizer(has_chat_template), style_of(config, model))
    return prompt.text


def tokens_for(model: str, *, has_chat_template: bool) -> str:
    """The prompt's tokens as text."""
    config, tokenizer = GenerateConfig(model=model, prompt=("abc",)), Tokenizer(has_chat_template)
    (prompt,) = read_prompts(config, tokenizer, style_of(config, model))
    return tokenizer.decode(prompt.token_ids.tolist())


@pytest.mark.parametrize(
    ("data", "has_chat_template", "expected"),
    [
        ({}, True, "[abc]"),
        ({}, False, "abc"),
        ({"prompt_format": "<{prompt}>"}, True, "<abc>"),
        ({"prompt_format": "<{prompt}>"}, False, "<abc>"),
        ({"template": "chat", "prompt_format": "<{prompt}>"}, True, "[abc]"),
        ({"template": "plain"}, True, "abc"),
        ({"template": "plain", "prompt_format": "<{prompt}>"}, True, "<abc>"),
    ],
)
def test_a_prompt_is_made_as_in_the_run(
    data: dict[str, str], has_chat_template: bool, expected: str, tmp_path: Path
) -> None:
    model = a_run(tmp_path, **data)
    assert prompt_for(model, has_chat_template=has_chat_template) == expected
    assert tokens_for(model, has_chat_template=has_chat_template) == expected


@pytest.mark.parametrize(
    ("template", "data", "expected"),
    [
        ("plain", {}, "abc"),
        ("plain", {"prompt_format": "<{prompt}>"}, "<abc>"),
        ("chat", {}, "[abc]"),
        ("chat", {"prompt_format": "<{prompt}>"}, "[abc]"),
        ("auto", {}, "[abc]"),
        ("chat", {"template": "plain"}, "abc"),
        ("plain", {"template": "chat"}, "[abc]"),
    ],
)
def test_a_run_remembers_what_its_rows_were(template: str, data: dict[str, str], expected: str, tmp_path: Path) -> None:
    """With data.template auto, texts and conversations become prompts in different ways."""
    model = a_run(tmp_path, **data)
    remember_prompts(tmp_path, template)
    assert prompt_for(model) == expected


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"template": "<other>"}', '{"template": []}'])
def test_what_a_run_remembers_may_be_damaged(content: str, tmp_path: Path) -> None:
    model = a_run(tmp_path)
    (tmp_path / "prompts.json").write_text(content)
    assert prompt_for(model) == "[abc]"


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [(["text"], "plain"), (["chat"], "chat"), (["chat", "chat"], "chat"), (["text", "chat"], "auto")],
)
def test_the_rows_say_how_they_became_prompts(kinds: list[str], expected: str, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}]
    rows = [{"prompt": "a" * (n + 1) if kind == "text" else turns} for n, kind in enumerate(kinds)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataSection(path=str(path), eval_fraction=0.0)
    assert RunData(prompts=load_prompts(section, Tokenizer(True), 16)).template == expected


def test_what_is_given_replaces_what_the_run_did(tmp_path: Path) -> None:
    model = a_run(tmp_path, prompt_format="<{prompt}>", template="plain", chat_template="theirs")
    assert prompt_for(model, prompt_format="{prompt}") == "abc"
    assert prompt_for(model, template="chat") == "[abc]"
    style = style_of(GenerateConfig(model=model, chat_template="mine"), model)
    assert (style.chat_template, style.template) == ("mine", "plain")


def test_rows_of_a_file_are_made_into_prompts_likewise(tmp_path: Path) -> None:
    model = a_run(tmp_path, prompt_format="<{prompt}>")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (tmp_path / "lines.txt").write_text("a\n\nb\n")
    for name in ("rows.jsonl", "lines.txt"):
        config = GenerateConfig(model=model, prompts=str(tmp_path / name))
        texts = [prompt.text for prompt in read_prompts(config, Tokenizer(False), style_of(config, model))]
        assert texts == ["<a>", "<b>"]


def test_other_models_and_damaged_runs_have_no_style(tmp_path: Path) -> None:
    model = a_run(tmp_path, prompt_format="<{prompt}>")
    assert prompt_style(model).prompt_format == "<{prompt}>"
    (tmp_path / "config.yaml").write_text("data: {prompt_format: nothing}\n")
    assert prompt_style(model) == DataSection()
    (tmp_path / "config.yaml").write_text("data: [")
    assert prompt_style(model) == DataSection()
    (tmp_path / "config.yaml").unlink()
    assert prompt_style(model) == DataSection()
    assert prompt_style("org/model") == DataSection()


def test_a_folder_beside_a_config_that_is_no_run_has_no_style(tmp_path: Path) -> None:
    model = a_run(tmp_path, prompt_format="<{prompt}>")
    (tmp_path / "status.json").unlink()
    assert prompt_style(model) == DataSection()


def test_a_format_without_the_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt_format: must hold \{prompt\} exactly once"):
        prompt_for(str(tmp_path), prompt_format="nothing")
