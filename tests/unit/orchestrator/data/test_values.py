"""One rule for each type of value, the same for every format, and nothing of a row taken twice or half."""

import datetime
import json
import re
import uuid
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.config.data import DataSection
from rlhf.errors import DataError
from rlhf.orchestrator.data import load_prompts
from rlhf.orchestrator.data.layout import training_split
from rlhf.orchestrator.data.problems import Problems
from rlhf.orchestrator.data.sources import read_rows
from rlhf.orchestrator.data.values import canonical_text, parse_json, plain
from rlhf.types import Json
from tests.unit.orchestrator.data.arrow_tables import arrow_tables
from tests.unit.orchestrator.data.data_support import PLAIN, complaints, load_demonstrations, section, write_rows

QUICK = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def values_of(path: Path, max_row_bytes: int = 2**20) -> list[dict[str, Json]]:
    problems = Problems(0)
    rows = read_rows(str(path), training_split(DataSection()), problems, max_row_bytes)
    problems.settle()
    return [dict(row.values) for row in rows]


def refusal_of(path: Path) -> list[str]:
    with pytest.raises(DataError) as error:
        values_of(path)
    return complaints(error)


def write_table(path: Path, columns: dict[str, pa.Array]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def save(path: Path, table: pa.Table) -> Path:
    datasets.disable_progress_bars()
    datasets.Dataset(datasets.table.InMemoryTable(table)).save_to_disk(str(path))
    return path


SAME: list[tuple[str, pa.Array, list[Json]]] = [
    ("text", pa.array(["a", "é", None]), ["a", "é", None]),
    ("large text", pa.array(["a"], pa.large_string()), ["a"]),
    ("view of text", pa.array(["a"], pa.string_view()), ["a"]),
    ("dictionary", pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
    ("bytes", pa.array([b"question", "é".encode()]), ["question", "é"]),
    ("bytes of one length", pa.array([b"abc"], pa.binary(3)), ["abc"]),
    ("bytes inside", pa.array([{"a": [b"x", b"y"]}]), [{"a": ["x", "y"]}]),
    ("integer", pa.array([1, -(2**63)]), [1, -(2**63)]),
    ("float", pa.array([2.0, 0.1]), [2.0, 0.1]),
    ("half", pa.array([1.5, 0.1, None], pa.float16()), [1.5, 0.1, None]),
    ("single", pa.array([0.1, None, 16777216.0, 1e-7], pa.float32()), [0.1, None, 16777216.0, 1e-7]),
    ("boolean", pa.array([True, False]), [True, False]),
    ("whole decimal", pa.array([Decimal("2.00")]), [2]),
    ("decimal", pa.array([Decimal("0.10")]), [0.1]),
    ("long decimal", pa.array([Decimal("12345678901234567890.12")]), ["12345678901234567890.12"]),
    ("date", pa.array([datetime.date(2024, 5, 1)]), ["2024-05-01"]),
    ("time of day", pa.array([datetime.time(1, 2, 3)]), ["01:02:03"]),
    ("time", pa.array([datetime.datetime(2024, 5, 1, 12)]), ["2024-05-01T12:00:00"]),
    ("time with zone", pa.array([0], pa.timestamp("s", tz="Europe/Berlin")), ["1970-01-01T01:00:00+01:00"]),
    ("nanoseconds", pa.array([1], pa.timestamp("ns")), ["1970-01-01T00:00:00.000000001"]),
    ("duration", pa.array([datetime.timedelta(minutes=2)]), [120.0]),
    ("null", pa.nulls(2), [None, None]),
    ("list", pa.array([[1, 2], []]), [[1, 2], []]),
    ("messages", pa.array([[{"role": "user", "content": "x"}]]), [[{"role": "user", "content": "x"}]]),
]


@pytest.mark.parametrize(("array", "expected"), [case[1:] for case in SAME], ids=[case[0] for case in SAME])
def test_parquet_and_saved_folders_give_the_same_values(tmp_path: Path, array: pa.Array, expected: list[Json]) -> None:
    path = write_table(tmp_path / "t.parquet", {"x": array})
    assert [row["x"] for row in values_of(path)] == expected
    assert [type(row["x"]) for row in values_of(path)] == [type(value) for value in expected]
    assert values_of(save(tmp_path / "saved", pa.table({"x": array}))) == values_of(path)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([[("a", 1), ("b", 2)], []], pa.map_(pa.string(), pa.int64())), [{"a": 1, "b": 2}, {}]),
        (pa.array([[(1, "a")]], pa.map_(pa.int64(), pa.string())), [{"1": "a"}]),
        (pa.array([uuid.UUID(int=1).bytes], pa.uuid()), [str(uuid.UUID(int=1))]),
        (pa.array(['{"a": 1}'], pa.json_()), ['{"a": 1}']),
        (pa.array([2**64 - 1], pa.uint64()), [2**64 - 1]),
    ],
    ids=["map", "map of integers", "uuid", "json", "unsigned"],
)
def test_kinds_that_only_parquet_has(tmp_path: Path, array: pa.Array, expected: list[Json]) -> None:
    assert [row["x"] for row in values_of(write_table(tmp_path / "t.parquet", {"x": array}))] == expected


NOT_TEXT = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
REFUSED: list[tuple[str, pa.Array, str]] = [
    ("bytes", pa.array([b"a\xff"]), "x is not text (got bytes)."),
    ("bytes inside", pa.array([[{"image": b"\xff"}]]), "x[0].image is not text (got bytes)."),
    ("text", NOT_TEXT, "x holds text that is not UTF-8."),
    ("NaN", pa.array([float("nan")]), "x is nan, which is no value; write null or leave it out."),
    ("infinity", pa.array([[float("-inf")]]), "x[0] is -inf, which is no value; write null or leave it out."),
    ("a far date", pa.array([2**62], pa.timestamp("us")), "x cannot be read (date value out of range)."),
    (
        "a zone that is not there",
        pa.array([1], pa.timestamp("us", tz="Mars/Base")),
        "x cannot be read (The zoneinfo module or pytz package must be installed).",
    ),
]


@pytest.mark.parametrize(("array", "complaint"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_value_that_cannot_be_kept_is_refused_by_name(tmp_path: Path, array: pa.Array, complaint: str) -> None:
    good = pa.nulls(1, array.type)
    path = write_table(tmp_path / "t.parquet", {"x": pa.concat_arrays([good, array])})
    assert refusal_of(path) == [f"t.parquet:2: {complaint}"]


def test_binary_text_is_trained_on_as_text(tmp_path: Path) -> None:
    columns = {"prompt": pa.array([b"question 0", b"question 1"]), "response": pa.array([b"answer"] * 2)}
    groups = load_demonstrations(section(write_table(tmp_path / "t.parquet", columns)), PLAIN).train
    assert [(group.prompt.text, group.texts) for group in groups] == [
        ("question 0", ("answer",)),
        ("question 1", ("answer",)),
    ]


@pytest.mark.parametrize(
    ("name", "content", "complaints"),
    [
        ("t.csv", "prompt,response,prompt\na,b,c\n", ['t.csv:1: column "prompt" is there twice.']),
        ("t.csv", "\n\na,b,a,b\n", ['t.csv:3: column "a" is there twice.', 't.csv:3: column "b" is there twice.']),
        ("t.jsonl", '{"prompt": "a", "prompt": "b"}\n', ['t.jsonl:1: key "prompt" given twice.']),
        ("t.jsonl", '{"x": 1}\n{"m": [{"role": "a", "role": "a"}]}\n', ['t.jsonl:2: key "role" given twice.']),
        ("t.json", '[{"x": 1},\n{"x": {"a": 1, "a": 2}}]', ['t.json[1]: key "a" given twice.']),
    ],
)
def test_a_column_that_is_there_twice_is_refused(
    tmp_path: Path, name: str, content: str, complaints: list[str]
) -> None:
    (tmp_path / name).write_text(content)
    assert refusal_of(tmp_path / name) == complaints


def test_a_column_that_parquet_has_twice_is_refused_at_every_depth(tmp_path: Path) -> None:
    both = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2]), both], names=["p", "p", "x"])
    pq.write_table(table, tmp_path / "t.parquet")
    assert refusal_of(tmp_path / "t.parquet") == [
        't.parquet: column "p" is there twice.',
        't.parquet: column "x.a" is there twice.',
    ]
    keys = pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64()))
    (line,) = refusal_of(write_table(tmp_path / "map.parquet", {"x": keys}))
    assert line.startswith("map.parquet:1: x cannot be read (")
    assert "'a'" in line


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("9" * 5000, "an integer of more than 4300 digits, which cannot be read; write it as text"),
        ("[" + "-" + "1" * 4301 + "]", "an integer of more than 4300 digits, which cannot be read; write it as text"),
        ("1e999", "the number 1e999 is outside what a float can hold; write it as text"),
        ("[-1e-999]", "the number -1e-999 is outside what a float can hold; write it as text"),
        ("[NaN]", "not valid JSON: NaN"),
        ("-Infinity", "not valid JSON: -Infinity"),
        ("[" * 102 + "]" * 102, "nested too deep"),
        ('{"a": ["\\ud83d"]}', "a[0] holds a lone surrogate at character 0"),
        ('{"\\uDEAD": 1}', "a key of the row holds a lone surrogate at character 0"),
    ],
)
def test_json_that_cannot_be_kept_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(complaint)}$"):
        parse_json(text)


def test_a_refused_row_of_a_list_leaves_the_others(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(f'[{{"prompt": "a"}}, {{"x": 1e999}}, {{"x": {"9" * 5000}}}, {{"prompt": "b"}}]')
    split = load_prompts(section(tmp_path / "t.json", max_bad_rows=2), PLAIN, 10)
    assert [prompt.text for prompt in split.train] == ["a", "b"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@QUICK
@given(JSON_VALUES)
def test_json_values_are_kept_as_they_are(value: Json) -> None:
    assert parse_json(json.dumps(value)) == value
    assert plain(value, "x") == value


@QUICK
@given(st.lists(st.dictionaries(st.text(min_size=1), JSON_VALUES, max_size=3), min_size=1, max_size=4))
def test_json_lines_and_a_json_list_are_the_same_rows(tmp_path: Path, rows: Sequence[dict[str, Json]]) -> None:
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    assert values_of(tmp_path / "list.json") == list(rows)
    if rows[0] and not any(isinstance(value, list) for value in rows[0].values()):
        assert values_of(write_rows(tmp_path / "t.jsonl", rows)) == list(rows)


@QUICK
@given(arrow_tables(st.sampled_from("abc")))
def test_any_parquet_schema_gives_rows_or_lines(tmp_path: Path, table: pa.Table) -> None:
    try:
        pq.write_table(table, tmp_path / "t.parquet")
    except (pa.ArrowException, OSError):
        return  # Parquet has no such column
    problems = Problems(0)
    rows = read_rows(str(tmp_path / "t.parquet"), training_split(DataSection()), problems)
    for row in rows:
        assert parse_json(json.dumps(row.values)) == row.values
    if len(rows) < len(table) or not rows:
        with pytest.raises(DataError):
            problems.settle()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, None), ("Paris", "Paris"), (["Paris"], "Paris"), ([[7]], "7"), ([None], None),
        (2.0, "2"), (-0.0, "0"), (0.1, "0.1"), (1e-7, "0.0000001"), (1e22, "1" + "0" * 22), (2, "2"), (True, "true"),
        (["Paris", "Rom"], '["Paris", "Rom"]'), ({"a": "é"}, '{"a": "é"}'), ([], "[]"),
    ],
)  # fmt: skip
def test_a_label_is_the_text_that_answers_are_compared_with(value: Json, text: str | None) -> None:
    assert canonical_text(value) == text


@QUICK
@given(st.integers(-(2**53), 2**53))
def test_a_whole_float_is_labeled_like_the_integer(number: int) -> None:
    assert canonical_text(float(number)) == canonical_text(number) == canonical_text([float(number)])


@QUICK
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_label_of_a_float_loses_nothing(number: float) -> None:
    text = canonical_text(number)
    assert text is not None
    assert float(text) == number


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["2.0", "", "3.0"], ["2", "", "3"]),
        (["2.0", "0.5", "-1.0"], ["2", "0.5", "-1"]),
        (["2.0", "3.50"], ["2.0", "3.50"]),
        (["2.0", "x"], ["2.0", "x"]),
        (["2.00"], ["2.00"]),
        (["2"], ["2"]),
        (["", ""], ["", ""]),
    ],
)
def test_labels_of_csv_are_numbers_where_all_are_floats(tmp_path: Path, cells: list[str], labels: list[str]) -> None:
    (tmp_path / "t.csv").write_text("prompt,label\n" + "".join(f"p{n},{cell}\n" for n, cell in enumerate(cells)))
    assert [prompt.label for prompt in load_prompts(section(tmp_path / "t.csv"), PLAIN, 100).train] == labels
    rows = [{"prompt": f"p{n}", "label": cell} for n, cell in enumerate(cells)]
    texts = load_prompts(section(write_rows(tmp_path / "t.jsonl", rows)), PLAIN, 100).train
    assert [prompt.label for prompt in texts] == cells


def test_labels_and_ids_of_a_table_with_gaps_are_whole_numbers(tmp_path: Path) -> None:
    rows = [{"prompt": "2 + 0 = ?", "label": 2.0, "id": 7.0}, {"prompt": "?", "label": None, "id": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    train = load_prompts(section(tmp_path / "t.parquet"), PLAIN, 100).train
    assert [(prompt.label, prompt.id) for prompt in train] == [("2", "7"), (None, "t.parquet:2")]
