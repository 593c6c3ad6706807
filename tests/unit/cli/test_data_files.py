"""No data file ends a command with the exit code of a bug: the answer is a report or lines about the rows."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.cli.main import main
from rlhf.config.commands import RowKind
from rlhf.engines.models.fresh_model import make_llama, train_tokenizer
from tests.unit.orchestrator.data.arrow_tables import arrow_tables

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KINDS = st.sampled_from([kind.value for kind in RowKind])
NAMES = st.sampled_from(
    [
        *("prompt", "question", "instruction", "input", "messages", "response", "answer", "text", "id", "system"),
        *("chosen", "rejected", "label", "labels", "completions", "ranking", "margin", "", "\x1b[31m", "é"),
    ]
)
ODD = [
    *("null", "true", "0", "-0.0", "1e999", "9" * 5000, "1" * 400, "NaN", '""', '" "', '"text"'),
    *('"\\ud800"', '"\\u0000"', '"\\u001b[31m"', '"\\n\\nHuman: a\\n\\nAssistant: b"', '{"a": {"b": [1]}}'),
    *("[]", "{}", "[[]]", '["a"]', '["a", "b"]', "[true, false]", "[" * 90 + "]" * 90, "[" * 5000 + "]" * 5000),
    *('[{"role": "user", "content": "a"}]', '[{"role": "assistant", "content": null, "tool_calls": []}]'),
    *(json.dumps('[{"role": "user", "content": "a"}]'), json.dumps("[{'role': 'user'}]")),
]
JSON_LINES = st.lists(
    st.lists(st.tuples(NAMES, st.sampled_from(ODD)), max_size=4).map(
        lambda pairs: "{" + ", ".join(f"{json.dumps(name)}: {value}" for name, value in pairs) + "}"
    ),
    min_size=1,
    max_size=3,
)
CELLS = st.sampled_from(["prompt", "label", "", "a", '"', '"a\nb"', "\x00", "é", "\ufeff", "1", " "])
CSV = st.tuples(
    st.lists(st.lists(CELLS, max_size=4).map(",".join), max_size=4), st.sampled_from(["\n", "\r\n", "\r"])
).map(lambda drawn: drawn[1].join(drawn[0]))


def attempt(capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
    code = main(list(arguments))
    shown = capsys.readouterr()
    assert code in (0, 2, 3), shown.err
    assert "\x1b[31m" not in shown.out + shown.err


def look_at(capsys: pytest.CaptureFixture[str], kind: str, path: Path) -> None:
    attempt(capsys, "data", kind, "--data.path", str(path), "--json")
    rewards = ("--policy.model", str(path.parent), "--reward.rules", "exact-match,number")
    command = {"prompts": ["grpo", *rewards], "labeled": ["kto"], "steps": ["prm"], "preferences": ["rm"]}
    attempt(capsys, "check", *command.get(kind, ["sft"]), "--data.path", str(path))


@QUICK
@given(KINDS, JSON_LINES)
def test_any_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, lines: list[str]) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    look_at(capsys, kind, path)
    path = tmp_path / "t.json"
    path.write_text(f"[{', '.join(lines)}]", encoding="utf-8")
    look_at(capsys, kind, path)


@QUICK
@given(KINDS, CSV, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]))
def test_any_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, text: str, encoding: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode(encoding, errors="replace"))
    look_at(capsys, kind, path)


@QUICK
@given(KINDS, arrow_tables(NAMES))
def test_any_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, table: pa.Table) -> None:
    path = tmp_path / "t.parquet"
    try:
        pq.write_table(table, path)
    except (pa.ArrowException, OSError):
        return  # Parquet has no such column
    look_at(capsys, kind, path)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model."""
    monkeypatch.chdir(tmp_path)
    train_tokenizer(["a b c"], 300, tmp_path / "model")
    make_llama(tmp_path / "model", vocab_size=300, hidden_size=32, num_layers=1, context=1024)
    return tmp_path


def test_check_names_what_is_not_read_and_labels_that_no_answer_equals(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = world / "set"
    folder.mkdir()
    for name, text in (("train", "p"), ("test", "q")):
        rows = [{"prompt": f"{text}{n}", "label": [float(n)], "topic": "x", "messages": []} for n in range(64)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["check", "grpo", "--policy.model", "model", "--reward.rules", "exact-match", "--data.path", "set"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "of set, the split train is read (train.jsonl); not test (test.jsonl).\n" in out
    assert "columns that nothing read: topic.\n" in out
    (folder / "train.jsonl").write_text('{"prompt": "a", "label": ["b", "c"]}\n' * 64)
    assert main(command) == 3
    first = 'data: row train.jsonl:1 has a label that is a list of 2 values (["b", "c"]), need one text or number'
    assert capsys.readouterr().err.splitlines()[0] == f"rlhf: error: {first} (reward exact-match)."
