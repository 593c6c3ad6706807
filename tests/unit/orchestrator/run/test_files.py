"""A file is replaced at once, after its bytes are on the disk; what is read back is whole lines."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.errors import CheckpointError
from rlhf.orchestrator.run.files import (
    append_json,
    keep_lines,
    overwrite_text,
    read_rows,
    sync_path,
    write_bytes,
    write_json,
    write_rows,
    write_text,
)

WRITERS: dict[str, tuple[Callable[[Path], None], bytes]] = {
    "text": (lambda path: write_text(path, "n\u00e9w\n"), "n\u00e9w\n".encode()),
    "bytes": (lambda path: write_bytes(path, b"\x00new"), b"\x00new"),
    "json": (lambda path: write_json(path, {"b": 1, "a": [True]}), b'{\n "a": [\n  true\n ],\n "b": 1\n}\n'),
    "rows": (lambda path: write_rows(path, iter([{"a": 1}, {"b": 2}])), b'{"a": 1}\n{"b": 2}\n'),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_replaced_when_all_of_it_is_on_the_disk(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, expected = WRITERS[name]
    path = tmp_path / "file"
    path.write_bytes(b"old")
    seen: list[tuple[bool, int, bytes]] = []
    flush = os.fsync

    def fsync(descriptor: int) -> None:
        flush(descriptor)
        what = Path(f"/proc/self/fd/{descriptor}").readlink()
        size = -1 if what == tmp_path else os.fstat(descriptor).st_size
        seen.append((what == tmp_path, size, path.read_bytes()))

    monkeypatch.setattr(os, "fsync", fsync)
    write(path)
    assert seen == [(False, len(expected), b"old"), (True, -1, expected)], "the bytes, then the new name"
    assert path.read_bytes() == expected
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_cannot_be_written_stays_and_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"file: cannot be written \(No space left on device\)$"):
        WRITERS[name][0](path)
    assert path.read_bytes() == b"old"


def test_bytes_that_could_not_be_written_leave_no_file_behind(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(CheckpointError, match="Is a directory"):
        write_bytes(tmp_path / "file", b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_rows_make_their_folder_and_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    for _ in range(2):
        write_rows(tmp_path / "a/b/rows.jsonl", [{"a": 1}])
    assert read_rows(tmp_path / "a/b/rows.jsonl") == [{"a": 1}]
    (tmp_path / "c").write_text("")
    with pytest.raises(CheckpointError, match=r"rows\.jsonl: cannot be written"):
        write_rows(tmp_path / "c/rows.jsonl", [])


def test_a_file_is_written_over_in_its_own_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("a longer text")
    number, flushed = path.stat().st_ino, list[bytes]()
    monkeypatch.setattr(os, "fsync", lambda _descriptor: flushed.append(path.read_bytes()))
    overwrite_text(path, "sh\u00f6rt")
    assert path.read_text(encoding="utf-8") == "sh\u00f6rt"
    assert path.stat().st_ino == number
    assert flushed == ["sh\u00f6rt".encode()]
    with pytest.raises(CheckpointError, match=r"other: cannot be written \(No such file or directory\)"):
        overwrite_text(tmp_path / "other", "x")


def test_lines_are_added_and_torn_ones_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_rows(path) == []
    append_json(path, {"step": 1, "text": "\u00e9"})
    append_json(path, {"step": 2})
    with path.open("ab") as file:
        file.write(b'[1]\n"x"\n{"step": 3, "a\xff\n' + b"[" * 5000 + b'\n{"step": 4}\n{"st')
    assert read_rows(path) == [{"step": 1, "text": "\u00e9"}, {"step": 2}, {"step": 4}]
    with pytest.raises(CheckpointError, match=r"nowhere/lines\.jsonl: cannot be written"):
        append_json(tmp_path / "nowhere/lines.jsonl", {})


def test_lines_past_a_step_are_dropped_with_those_that_have_none(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    keep_lines(path, 3)
    assert not path.exists()
    path.write_text('{"step": 3}\n{"step": 4}\n{"step": "1"}\n{"a": 1}\n[3]\n{"step": 1, "b": 2}\n{"step": 0')
    keep_lines(path, 3)
    assert path.read_text() == '{"step": 3}\n{"step": 1, "b": 2}\n'
    keep_lines(path, -1)
    assert path.read_text() == ""


def test_no_descriptor_stays_open_after_a_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    before = len(list(Path("/proc/self/fd").iterdir()))
    sync_path(tmp_path)
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output error"):
        sync_path(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
