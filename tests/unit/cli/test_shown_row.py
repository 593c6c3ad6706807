"""`rlhf data` shows a row as the model gets it, in color and without."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from rlhf.cli.main import main
from rlhf.cli.shown_row import MAX_TOKENS, shown_row
from rlhf.engines.base import Tokenizer
from rlhf.engines.models.fresh_model import make_llama, train_tokenizer
from rlhf.engines.models.tokenizer import load_tokenizer
from rlhf.orchestrator.data.encoding import EncodedResponse
from rlhf.types import Prompt

pytestmark = pytest.mark.timeout(120)

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    train_tokenizer(["user assistant hello there"], 300, folder).save_pretrained(folder)
    make_llama(folder, vocab_size=300, hidden_size=32, num_layers=1)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": CHAT}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return load_tokenizer(str(model))


def encoded(tokenizer: Tokenizer, *parts: tuple[str, bool]) -> EncodedResponse:
    ids = [tokenizer.encode(text) for text, _ in parts]
    written = [flag for part, (_, flag) in zip(ids, parts, strict=True) for _ in part]
    return EncodedResponse(
        text="", token_ids=np.array([token for part in ids for token in part]), written=np.array(written)
    )


def a_prompt(tokenizer: Tokenizer, text: str, label: str | None = None) -> Prompt:
    return Prompt(id="rows.jsonl:1", token_ids=np.array(tokenizer.encode(text)), text=text, label=label)


def test_trained_parts_are_marked_where_there_is_no_color(tokenizer: Tokenizer) -> None:
    response = encoded(tokenizer, ("hello", True), ("user: hm", False), ("there</s>", True))
    lines = list(shown_row(a_prompt(tokenizer, "<s>Hi", "5"), [response], tokenizer, in_color=False))
    assert [line.plain for line in lines] == [
        "row rows.jsonl:1 as the model gets it (trained tokens are between « and »):",
        f"prompt, {len(tokenizer.encode('<s>Hi'))} tokens:",
        "<s>Hi",
        f"response, {len(response.token_ids)} tokens, {int(response.written.sum())} of them trained on:",
        "«hello»user: hm«there</s>»",
        "label: 5",
    ]


def test_in_color_the_same_parts_have_a_style_and_special_tokens_another(tokenizer: Tokenizer) -> None:
    response = encoded(tokenizer, ("hello</s>", True))
    line = list(shown_row(a_prompt(tokenizer, "<s>Hi"), [response], tokenizer, in_color=True))[-1]
    assert line.plain == "hello</s>"
    styled = {line.plain[span.start : span.end]: span.style for span in line.spans}
    assert styled == {"hello": "bold green", "</s>": "bold green reverse"}


def test_the_middle_of_a_long_text_is_left_out(tokenizer: Tokenizer) -> None:
    response = encoded(tokenizer, ("a", False), ("x" * (2 * MAX_TOKENS), True))
    shown = list(shown_row(a_prompt(tokenizer, "Hi"), [response], tokenizer, in_color=False))[-1].plain
    left_out = len(response.token_ids) - MAX_TOKENS
    assert f"»\n... {left_out} tokens ...\n«" in shown
    assert shown.startswith("a«x")


@pytest.mark.parametrize(
    ("kind", "row", "shown"),
    [
        (
            "demonstrations",
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
            ["<s>user:hi<s>assistant:", "«ho</s>»"],
        ),
        ("preferences", {"prompt": "hi ", "chosen": "good", "rejected": "bad"}, ["hi ", "«good</s>»", "«bad</s>»"]),
        ("prompts", {"prompt": "hi", "answer": "5"}, ["(the policy continues it)", "hi", "label: 5"]),
    ],
)
def test_the_command_shows_the_first_row(
    kind: str,
    row: dict[str, object],
    shown: list[str],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    assert main(["data", kind, "--data.path", str(rows), "--tokenizer", str(model)]) == 0
    out = capsys.readouterr().out
    after = out[out.index("row rows.jsonl:1 as the model gets it") :]
    assert all(text in after for text in shown), after
    assert main(["data", kind, "--data.path", str(rows)]) == 0
    assert re.search(r"--tokenizer MODEL shows a row", capsys.readouterr().out)
