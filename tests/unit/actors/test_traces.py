"""The trace of what an actor was busy with."""

import json
from pathlib import Path

import pytest

from rlhf.actors.logs import Trace


def test_a_span_is_a_line(tmp_path: Path) -> None:
    with Trace(tmp_path / "trace.jsonl").span("score"):
        pass
    (row,) = map(json.loads, (tmp_path / "trace.jsonl").read_text().splitlines())
    assert row["call"] == "score"
    assert row["start"] <= row["end"]


def test_a_full_disk_costs_the_record_and_not_the_call() -> None:
    full = Trace(Path("/dev/full"))
    with full.span("score"):
        done = True
    assert done
    with pytest.raises(ZeroDivisionError), full.span("score"):
        _ = 1 / 0
