"""Whatever a data file holds, the response is rows or lines about them, never a traceback."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.errors import DataError, ModelError
from rlhf.orchestrator.data import load_prompts
from tests.unit.orchestrator.data.data_support import (
    CHAT,
    PLAIN,
    load_demonstrations,
    load_labeled,
    load_preferences,
    load_steps,
    load_texts,
    section,
)

LOADERS: dict[str, Callable[..., object]] = {
    "prompts": lambda keys, tokenizer: load_prompts(keys, tokenizer, 20),
    "demonstrations": load_demonstrations,
    "preferences": load_preferences,
    "labeled": load_labeled,
    "steps": load_steps,
    "texts": load_texts,
}
NUM_EXAMPLES = int(os.environ.get("RLHF_TEST_EXAMPLES", "60"))
QUICK = settings(max_examples=NUM_EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
COLUMNS = st.sampled_from(
    [
        *("prompt", "question", "input", "messages", "response", "completion", "answer", "output", "text", "id"),
        *("chosen", "rejected", "label", "labels", "completions", "responses", "ranking", "margin", "x"),
    ]
)
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["", " ", "<s>", "\n\nHuman: a\n\nAssistant: b", "a#### 7", "NaN", "\x00", "\ud800", "true"]
)
TURN = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from(["user", "assistant", "tool", "bot"]), "content": TEXTS}
)
CELLS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.lists(TURN, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(COLUMNS, inner, max_size=2),
    max_leaves=4,
)
ROWS = st.lists(st.dictionaries(COLUMNS, CELLS, max_size=5) | CELLS, max_size=5)
PLAUSIBLE = st.lists(
    st.fixed_dictionaries(
        {"prompt": TEXTS}, optional={"chosen": TEXTS, "rejected": TEXTS, "response": TEXTS, "label": st.booleans()}
    ),
    min_size=1,
    max_size=5,
)


def attempt(kind: str, path: Path, *, chat: bool) -> None:
    problems: tuple[str, ...] = ("none",)
    try:
        LOADERS[kind](section(path, max_tokens=20), CHAT if chat else PLAIN)
    except (DataError, ModelError) as error:
        problems = error.problems
    assert problems
    assert all(problem.strip() for problem in problems)


@QUICK
@given(st.sampled_from(list(LOADERS)), ROWS | PLAUSIBLE, st.booleans())
def test_any_rows(tmp_path: Path, kind: str, rows: list[object], chat: bool) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    attempt(kind, path, chat=chat)


@QUICK
@given(st.sampled_from(list(LOADERS)), ROWS | PLAUSIBLE)
def test_any_rows_as_one_json_document(tmp_path: Path, kind: str, rows: list[object]) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    attempt(kind, path, chat=False)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet", "jsonl.gz", "csv.gz"])
@QUICK
@given(st.sampled_from(list(LOADERS)), st.binary(max_size=60) | st.text(alphabet='{}[]",:\n apromt1', max_size=40))
def test_any_bytes(tmp_path: Path, ending: str, kind: str, content: bytes | str) -> None:
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    attempt(kind, path, chat=False)


@QUICK
@given(st.sampled_from(list(LOADERS)), PLAUSIBLE, st.integers(0, 200), st.integers(0, 7))
def test_a_good_file_with_one_bit_turned(tmp_path: Path, kind: str, rows: list[object], place: int, bit: int) -> None:
    content = bytearray("".join(json.dumps(row) + "\n" for row in rows).encode())
    content[place % len(content)] ^= 1 << bit
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    attempt(kind, path, chat=False)
    zipped = tmp_path / "rows.jsonl.gz"
    packed = gzip.compress(bytes(content))
    zipped.write_bytes(packed[: place % len(packed)])
    attempt(kind, zipped, chat=False)
