"""Chat templates chosen by name or file, and templates that fail: the user's files, each with one line."""

from contextlib import suppress
from pathlib import Path

import pytest

from rlhf.cli.main import main
from rlhf.config.data import DataSection
from rlhf.engines.models.tokenizer import HfTokenizer, load_tokenizer
from rlhf.errors import DataError, ModelError
from rlhf.types import Message
from tests.unit.engines.models.chat_tokenizers import chat_tokenizer, save_tokenizer
from tests.unit.orchestrator.data.data_support import load_demonstrations, write_rows

ONE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OTHER = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
MARKS = ["<|im_start|>", "<|im_end|>", "<|end|>"]
HELLO = [Message(role="user", content="hi"), Message(role="assistant", content="hello")]
ROWS = [{"messages": [{"role": "user", "content": "hi 0"}, {"role": "assistant", "content": "hello"}]}]


def test_several_templates_without_a_default_are_refused_with_their_names(tmp_path: Path) -> None:
    folder = save_tokenizer(chat_tokenizer({"tool_use": ONE, "rag": ONE}, MARKS), tmp_path / "tokenizer")
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ModelError) as error:
        load_demonstrations(DataSection(path=str(path)), load_tokenizer(folder))
    assert str(error.value) == (
        "tokenizer: 2 chat templates (rag, tool_use) and none is called default; set data.chat_template to one of them."
    )
    plain = [{"prompt": "hi", "response": "hello"}]
    path = write_rows(tmp_path / "plain.jsonl", plain)
    assert len(load_demonstrations(DataSection(path=str(path)), load_tokenizer(folder)).train) == 1


def test_a_template_is_chosen_by_its_name(tmp_path: Path) -> None:
    folder = save_tokenizer(chat_tokenizer({"default": ONE, "rag": OTHER}, MARKS), tmp_path)
    usual, chosen = load_tokenizer(folder), load_tokenizer(folder, chat_template="rag")
    assert usual.render(HELLO, add_generation_prompt=False).startswith("<|im_start|>user\nhi")
    assert chosen.render(HELLO, add_generation_prompt=False) == "<|user|>hi<|end|><|assistant|>hello<|end|>"
    assert chosen.fingerprint() == usual.fingerprint()
    end = chosen.encode("<|end|>")[0]
    assert end in chosen.stop_token_ids
    assert end not in usual.stop_token_ids


def test_a_template_is_read_from_a_file(tmp_path: Path) -> None:
    folder = save_tokenizer(chat_tokenizer(ONE, MARKS), tmp_path / "tokenizer")
    file = tmp_path / "mine.jinja"
    file.write_text(OTHER)
    tokenizer = load_tokenizer(folder, chat_template=str(file))
    assert tokenizer.render(HELLO, add_generation_prompt=False) == "<|user|>hi<|end|><|assistant|>hello<|end|>"


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ("other", 'data.chat_template: "other" is no .jinja file, and the tokenizer has default, rag.'),
        ("none.jinja", "data.chat_template: none.jinja cannot be read (No such file or directory)."),
        ("{tmp}/empty.jinja", "data.chat_template: {tmp}/empty.jinja is empty."),
        ("{tmp}/binary.jinja", "data.chat_template: {tmp}/binary.jinja is not UTF-8 at byte 1."),
        ("{tmp}/folder.jinja", "data.chat_template: {tmp}/folder.jinja cannot be read (Is a directory)."),
        ("", 'data.chat_template: "" is no .jinja file, and the tokenizer has default, rag.'),
    ],
)
def test_a_template_that_is_not_there_is_refused(asked: str, complaint: str, tmp_path: Path) -> None:
    folder = save_tokenizer(chat_tokenizer({"default": ONE, "rag": OTHER}, MARKS), tmp_path / "tokenizer")
    (tmp_path / "empty.jinja").write_text("\n")
    (tmp_path / "binary.jinja").write_bytes(b"a\xff")
    (tmp_path / "folder.jinja").mkdir()
    with pytest.raises(ModelError) as error:
        load_tokenizer(folder, chat_template=asked.replace("{tmp}", str(tmp_path)))
    assert str(error.value) == complaint.replace("{tmp}", str(tmp_path))


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ messages[0].role + 1 }}", 'fails: can only concatenate str (not "int") to str.'),
        ("{{ 1 / 0 }}", "fails: division by zero."),
        ("{{ messages[0]['content'].index('nowhere') }}", "fails: substring not found."),
        ("{{ [1][2] + 'x' }}", "refuses the messages: list object has no element 2."),
        ("{{ 'x' * (2 ** 62) }}", "fails: MemoryError."),
        ("{{ raise_exception('system\\nfirst') }}", "refuses the messages: system first."),
        ("{{ messages | map('int') | sum | round('x') }}", "fails:"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: maximum recursion depth exceeded"),
    ],
)
def test_a_template_that_fails_is_a_wrong_row(template: str, complaint: str, tmp_path: Path) -> None:
    tokenizer = HfTokenizer(chat_tokenizer(template, MARKS))
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError) as error:
        load_demonstrations(DataSection(path=str(path)), tokenizer)
    (problem,) = error.value.problems
    assert f"rows.jsonl:1: the chat template {complaint}" in problem


def test_a_template_that_is_no_jinja_is_refused_once_with_its_line(tmp_path: Path) -> None:
    folder = save_tokenizer(chat_tokenizer(ONE, MARKS), tmp_path / "tokenizer")
    (tmp_path / "bad.jinja").write_text("a\n{% for m in messages %}\n{{ m. }}")
    path = write_rows(tmp_path / "rows.jsonl", ROWS * 3)
    with pytest.raises(ModelError, match=r"^tokenizer: the chat template, line 3: expected name or number\.$"):
        load_demonstrations(
            DataSection(path=str(path)), load_tokenizer(folder, chat_template=str(tmp_path / "bad.jinja"))
        )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}'),
        ("tokenizer.json", '{"added_tokens": 3, "model": null}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("tokenizer_config.json", '{"chat_template": {"a": 1}, "tokenizer_class": "PreTrainedTokenizerFast"}'),
        ("tokenizer_config.json", '{"eos_token": 3, "tokenizer_class": "PreTrainedTokenizerFast"}'),
        ("special_tokens_map.json", "3"),
    ],
)
def test_damaged_tokenizer_files_are_nothing_but_models_that_cannot_be_used(
    name: str, content: str, tmp_path: Path
) -> None:
    folder = save_tokenizer(chat_tokenizer(ONE, MARKS), tmp_path)
    (tmp_path / name).write_text(content)
    with suppress(ModelError):
        load_tokenizer(folder)


def test_the_report_takes_the_template_and_ends_with_3_where_it_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tokenizer(chat_tokenizer({"tool_use": ONE, "rag": ONE}, MARKS), tmp_path / "tokenizer")
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    command = ["data", "demonstrations", "--data.path", str(path), "--tokenizer", folder]
    assert main(command) == 3
    assert "2 chat templates (rag, tool_use)" in capsys.readouterr().err
    assert main([*command, "--data.chat-template", "rag"]) == 0
