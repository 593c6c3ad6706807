"""Reading files: every kind, every way in which one can be damaged, and the line that the user gets."""

import datetime
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf.config.data import DataSection
from rlhf.errors import DataError
from rlhf.orchestrator.data import load_prompts
from rlhf.orchestrator.data.files import Source
from rlhf.orchestrator.data.layout import training_split
from rlhf.orchestrator.data.problems import Problems
from rlhf.orchestrator.data.readers import read_file
from rlhf.orchestrator.data.sources import read_rows
from tests.unit.orchestrator.data.data_support import PLAIN, complaints, section, write_rows

ROWS = [{"prompt": "one", "label": "1"}, {"prompt": "two, and\nmore", "label": "2"}]


def prompts_of(path: Path | str, **keys: object) -> list[str]:
    split = load_prompts(section(path, **keys), PLAIN, 1000)
    return [prompt.text for prompt in split.train]


def jsonl(rows: object = ROWS) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)  # type: ignore[attr-defined]


def parquet() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), stream)
    return stream.getvalue()


CSV = b'prompt,label\none,1\n"two, and\nmore",2\n'
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", jsonl()),
        ("rows.jsonl.gz", gzip.compress(jsonl(), mtime=0)),
        ("bom.jsonl", BOM + jsonl()),
        ("crlf.jsonl", jsonl().replace(b"\n", b"\r\n")),
        ("blank_lines.jsonl", b"\n\n" + jsonl().replace(b"\n", b"\n \n")),
        ("no_last_newline.jsonl", jsonl().rstrip()),
        ("list.json", json.dumps(ROWS, indent=2).encode()),
        ("bom_list.json", BOM + json.dumps(ROWS).encode()),
        ("lines.json", jsonl()),
        ("list.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("rows.csv", CSV),
        ("bom_crlf.csv", BOM + b'prompt,label\r\none,1\r\n"two, and\nmore",2\r\n'),
        ("rows.csv.gz", gzip.compress(CSV, mtime=0)),
        ("rows.parquet", parquet()),
        ("rows.parquet.gz", gzip.compress(parquet(), mtime=0)),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert prompts_of(tmp_path / name) == ["one", "two, and\nmore"]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("t.jsonl", b"", "data: t.jsonl has no rows."),
        ("t.jsonl", b"\n \r\n\n", "data: t.jsonl has no rows."),
        ("t.json", b"[]", "data: t.json has no rows."),
        ("t.csv", b"prompt\n", "data: t.csv has no rows."),
        ("t.jsonl", jsonl() + b'{"prompt": "x",}\n', "t.jsonl:3: not valid JSON: trailing comma."),
        ("t.jsonl", b'{"prompt": "x"\n', "t.jsonl:1: not valid JSON: Expecting ',' delimiter (column 15)."),
        ("t.jsonl", b'{"prompt": NaN}\n', "t.jsonl:1: not valid JSON: NaN."),
        ("t.jsonl", b'["prompt"]\n', "t.jsonl:1: not an object (got list)."),
        ("t.jsonl", b"[" * 100_000 + b"\n", "t.jsonl:1: nested too deep."),
        ("t.jsonl", b'{"prompt": "abc\xff"}\n', "t.jsonl:1: not UTF-8 at byte 15."),
        ("t.jsonl", b'{"prompt": "a\\ud800"}\n', "t.jsonl:1: prompt holds a lone surrogate at character 1."),
        ("t.jsonl", b'{"prompt": "a\\u0000b"}\n', "t.jsonl:1: prompt holds a NUL byte."),
        ("t.json", b'[{"prompt": "a"},\n {"prompt": }]', "t.json:2: not valid JSON: Expecting value (column 13)."),
        ("t.json", b'[{"prompt": "a"},\n\n 7]', "t.json[1]: not an object (got int)."),
        ("t.json", b'[{"prompt": "a"}', "t.json:1: not valid JSON: Expecting ',' delimiter (column 17)."),
        ("t.csv", b"prompt,label\na,1\nb\n", "t.csv:3: 1 fields, the header has 2."),
        ("t.csv", b'prompt\n"a\n', "t.csv:2: not valid CSV: unexpected end of data."),
        ("t.csv", b"prompt\na\n\xff\n", "t.csv:3: not UTF-8 at byte 0."),
        ("t.jsonl.gz", b"not gzip at all", "t.jsonl.gz: damaged gzip file (Not a gzipped file (b'no'))."),
        ("t.parquet", parquet()[:-6], "t.parquet: damaged file (no footer)."),
        ("t.parquet", b"", "t.parquet: damaged file (no footer)."),
    ],
)
def test_a_damaged_file_gives_its_line(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        prompts_of(tmp_path / name)
    assert complaints(error) == [complaint]


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.parquet", "t.jsonl.gz"])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(DataError) as error:
        prompts_of(tmp_path / name)
    advice = f"a pointer of Git LFS in place of the file; run `git lfs pull` in {tmp_path}."
    assert complaints(error) == [f"{name}: {advice}"]


def test_a_file_that_is_not_there_is_named_as_the_user_wrote_it(tmp_path: Path) -> None:
    for pattern in (f"{tmp_path}/*.jsonl", f"{tmp_path}/train.jsonl"):
        with pytest.raises(DataError) as error:
            prompts_of(pattern)
        assert complaints(error) == [f"data: {pattern} matches no file."]


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [
        ("s3://bucket/rows.jsonl", "Addresses are not read; download the file, or name a hub data set as owner/name."),
        ("https://host/rows.jsonl", "Addresses are not read; download the file, or name a hub data set as owner/name."),
        ("a.jsonl,b.jsonl", "Lists and braces are not read; name one folder, or a glob of *, ? and [...] in quotes."),
        ("{a,b}.jsonl", "Lists and braces are not read; name one folder, or a glob of *, ? and [...] in quotes."),
    ],
)
def test_a_path_that_other_tools_read_is_told_what_is_read(pattern: str, advice: str) -> None:
    with pytest.raises(DataError) as error:
        prompts_of(pattern)
    assert complaints(error) == [f"data: {pattern} matches no file. {advice}"]


@pytest.mark.parametrize(("separator", "name"), [(";", ";"), ("\t", "tabs"), ("|", "|")])
def test_a_csv_file_with_other_separators_is_named(tmp_path: Path, separator: str, name: str) -> None:
    (tmp_path / "t.csv").write_text(f"prompt{separator}label\na{separator}b\n")
    with pytest.raises(DataError) as error:
        prompts_of(tmp_path / "t.csv")
    assert complaints(error) == [f"t.csv:1: columns are divided by {name}; need commas. Save the file with commas."]


def test_a_file_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match=r"rows.xlsx: unknown kind of file \(have .jsonl, .json, .csv, .parquet"):
        prompts_of(tmp_path / "rows.xlsx")


def test_a_gzip_file_cut_short_says_where(tmp_path: Path) -> None:
    content = gzip.compress(jsonl([{"prompt": str(number) * 50} for number in range(100)]), mtime=0)
    (tmp_path / "t.jsonl.gz").write_bytes(content[:-20])
    with pytest.raises(DataError) as error:
        prompts_of(tmp_path / "t.jsonl.gz")
    assert complaints(error) == [f"t.jsonl.gz: ends early at byte {len(content) - 20}."]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.gz", ".csv.gz"])
def test_a_gzip_bomb_is_stopped_at_the_bound(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bomb{suffix}"
    path.write_bytes(gzip.compress(b"[" + b" " * 30_000_000))
    with pytest.raises(DataError, match=rf"^bomb{suffix}: expands past 1000000 bytes.$"):
        list(read_file(Source(path=path, label=path.name, max_bytes=1_000_000), Problems(0)))


def test_a_glob_reads_its_files_in_order_and_labels_equal_names_by_their_path(tmp_path: Path) -> None:
    for folder in ("b", "a"):
        (tmp_path / folder).mkdir()
        write_rows(tmp_path / folder / "t.jsonl", [{"prompt": folder}])
    rows = read_rows(f"{tmp_path}/*/t.jsonl", training_split(DataSection()), Problems(0))
    assert [row.values["prompt"] for row in rows] == ["a", "b"]
    assert [row.where for row in rows] == [f"{tmp_path}/a/t.jsonl:1", f"{tmp_path}/b/t.jsonl:1"]


def test_a_folder_means_the_data_files_in_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.jsonl", [{"prompt": "x"}])
    (tmp_path / "README.md").write_text("no data")
    assert prompts_of(tmp_path) == ["x"]


def test_problems_of_several_files_come_at_once_in_twenty_lines_that_say_how_many_there_are(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"prompt": " "}] * 25)
    write_rows(tmp_path / "b.jsonl", [{"prompt": "fine"}, {"prompt": 7}])
    (tmp_path / "c.parquet").write_bytes(b"")
    with pytest.raises(DataError) as error:
        prompts_of(f"{tmp_path}/*")
    assert complaints(error) == [
        *(f"a.jsonl:{number}: prompt is empty." for number in range(1, 9)),
        "a.jsonl: 17 more rows are wrong.",
        "b.jsonl:2: prompt is not text (got int).",
        "c.parquet: damaged file (no footer).",
    ]


def test_bad_rows_up_to_the_allowance_are_dropped_named_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows(tmp_path / "t.jsonl", [{"prompt": "a"}, {"prompt": None}, {"prompt": "b"}])
    split = load_prompts(section(path, max_bad_rows=1), PLAIN, 100)
    assert [prompt.text for prompt in split.train] == ["a", "b"]
    assert split.dropped == {"wrong": 1}
    assert "row dropped: t.jsonl:2: prompt is empty." in caplog.messages
    write_rows(path, [{"prompt": "a"}, {"prompt": None}, {"prompt": ""}])
    with pytest.raises(DataError) as error:
        load_prompts(section(path, max_bad_rows=1), PLAIN, 100)
    assert len(complaints(error)) == 2


def test_a_parquet_row_is_numbered_and_its_dates_become_text(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "day": datetime.date(2024, 5, 1)}, {"prompt": "", "day": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    split = load_prompts(section(tmp_path / "t.parquet", max_bad_rows=1), PLAIN, 100)
    assert split.train[0].metadata == {"day": "2024-05-01"}
    with pytest.raises(DataError) as error:
        prompts_of(tmp_path / "t.parquet")
    assert complaints(error) == ["t.parquet:2: prompt is empty."]
