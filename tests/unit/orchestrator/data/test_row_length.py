"""A row that is too long is refused before it is parsed, in bounded memory; and what a file looks like is said once."""

import gzip
import json
import logging
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.config.data import DataSection
from rlhf.errors import DataError
from rlhf.orchestrator.data import progress
from rlhf.orchestrator.data.layout import training_split
from rlhf.orchestrator.data.problems import Problems
from rlhf.orchestrator.data.sources import read_rows
from tests.unit.orchestrator.data.data_support import complaints

MIB = 2**20
LONG = "x" * (30 * MIB)
TOO_LONG = "row longer than 1048576 bytes; raise data.max_row_bytes if it is meant."


def read(path: Path, max_row_bytes: int = MIB) -> tuple[list[object], list[str]]:
    """The column `a` of the good rows, and every complaint."""
    problems = Problems(0)
    rows = read_rows(str(path), training_split(DataSection()), problems, max_row_bytes)
    try:
        problems.settle()
    except DataError as error:
        return [row.values["a"] for row in rows], list(error.problems)
    return [row.values["a"] for row in rows], []


@pytest.mark.parametrize(
    ("name", "content", "good", "where"),
    [
        ("t.jsonl", f'{{"a": "1"}}\n{{"a": "{LONG}"}}\n{{"a": "2"}}\n', ["1", "2"], "t.jsonl:2"),
        ("t.jsonl", f'{{"a": "1"}}\n{"[" * 30 * MIB}\n', ["1"], "t.jsonl:2"),
        ("t.json", f'[{{"a": "1"}}, {{"a": "{LONG}"}}, {{"a": "2"}}]', ["1"], "t.json[1]"),
        ("t.json", f'[{{"a": "1"}}, {{"a": [{"[1]," * 4 * MIB}', ["1"], "t.json[1]"),
        ("t.csv", f"a\n1\n{LONG}\n2\n", ["1"], "t.csv:3"),
        (
            "t.csv",
            f'a\n1\n"{"x" * 99 + chr(10)}"\n"{("x" * 99 + chr(10)) * 20 * 1024}"\n',
            ["1", "x" * 99 + "\n"],
            "t.csv:5",
        ),
        ("t.csv", f"a\n1\n{'1,' * 15 * MIB}\n", ["1"], "t.csv:3"),
    ],
    ids=["lines", "nested", "list", "list without an end", "csv", "quoted lines", "fields"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["", "gz"])
def test_a_row_of_tens_of_megabytes_is_refused_in_bounded_memory(
    tmp_path: Path, name: str, content: str, good: list[str], where: str, packed: bool
) -> None:
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(content.encode(), 1) if packed else content.encode())
    tracemalloc.start()
    found = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == (good, [f"{where.replace(name, path.name)}: {TOO_LONG}"])
    assert peak < 60 * MIB


def test_a_row_of_parquet_that_is_too_long_leaves_the_others(tmp_path: Path) -> None:
    column = pa.array(["1", LONG, "2"] * 2)
    for name, array in (("plain", column), ("dictionary", column.dictionary_encode())):
        pq.write_table(pa.table({"a": array}), tmp_path / f"{name}.parquet")
        lines = [f"{name}.parquet:{number}: {TOO_LONG}" for number in (2, 5)]
        assert read(tmp_path / f"{name}.parquet") == (["1", "2", "1", "2"], lines)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["jsonl", "json", "csv"]), st.integers(1, 40), st.sampled_from(["\n", "\r\n"]))
def test_the_limit_is_exact(tmp_path: Path, kind: str, size: int, end: str) -> None:
    """Of rows with 1 to 40 bytes those up to the limit are read, line ends aside."""
    text = "é" * (size // 2) + "a" * (size % 2)
    row = text if kind == "csv" else json.dumps({"a": text}, ensure_ascii=False)
    path = tmp_path / f"t.{kind}"
    content = {"jsonl": row + end, "json": f"[{end}{row}{end}]", "csv": f"a{end}{row}{end}"}[kind]
    path.write_text(content, encoding="utf-8", newline="")
    length = len(row) if kind == "json" else len(row.encode())
    assert read(path, length) == ([text], [])
    assert read(path, length - 1)[1] if length > 1 else True


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("t.json", '{"data": [{"a": 1}]}', 'looks like one object that holds the rows under "data".'),
        ("t.json", '{"version": "1", "rows": [{"a": 1}]}\n', 'looks like one object that holds the rows under "rows".'),
        ("t.json", '{\n "data": [\n  {\n   "a": 1}]}', 'looks like one object that holds the rows under "data".'),
        ("t.jsonl", '{"data": [{"a": 1}, {"a": 2}]}', 'looks like one object that holds the rows under "data".'),
        ("t.json", '{\n "a": 1\n}\n{\n "a": 2\n}\n', "looks like an object over several lines."),
        ("t.jsonl", '\n\n{"a": [\n1]}', "looks like an object over several lines."),
        ("t.jsonl", '[\n {"a": 1}\n]', "looks like a JSON list over several lines."),
    ],
)
def test_a_file_of_another_shape_gets_one_line(tmp_path: Path, name: str, content: str, complaint: str) -> None:
    (tmp_path / name).write_text(content)
    rows, (line,) = read(tmp_path / name)
    assert rows == []
    number = len(content) - len(content.lstrip("\n")) + 1
    assert line.startswith(f"{name}:{number}: {complaint}")


def test_one_row_of_messages_is_no_wrapper(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('{"a": 1, "messages": [{"role": "user", "content": "hi"}]}')
    assert read(tmp_path / "t.json") == ([1], [])


def test_other_encodings_get_one_line(tmp_path: Path) -> None:
    for name in ("t.jsonl", "t.csv"):
        (tmp_path / name).write_text('a\n"b"\n', encoding="utf-16")
        with pytest.raises(DataError) as error:
            read_or_raise(tmp_path / name)
        assert complaints(error) == [f"{name}:1: not UTF-8 but UTF-16; save the file as UTF-8."]


def read_or_raise(path: Path) -> None:
    problems = Problems(0)
    read_rows(str(path), training_split(DataSection()), problems)
    problems.settle()


def test_reading_a_long_file_shows_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    caplog.set_level(logging.INFO, "rlhf")
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n')
    read(tmp_path / "t.jsonl")
    assert "reading t.jsonl: 9 of 9 bytes" in caplog.messages
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "t.parquet")
    read(tmp_path / "t.parquet")
    assert "reading t.parquet: 2 of 2 rows" in caplog.messages
