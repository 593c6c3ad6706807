"""What a run says of its machine before its models are loaded."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from rlhf.launch import memory_forecast
from rlhf.planning.hardware import GIB

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.mark.parametrize(("free_mib", "is_told"), [(63, True), (1023, True), (1024, False)])
def test_too_little_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch, free_mib: int, is_told: bool) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: Usage(GIB, 0, free_mib * 2**20))
    lines = memory_forecast.scarce_shared_memory()
    assert bool(lines) is is_told
    if is_told:
        assert lines[0].startswith(f"warning: {free_mib / 1024:.2f} GiB free in /dev/shm: ")
        assert "--shm-size" in lines[0]


def test_a_machine_without_shared_memory_is_not_told_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory_forecast, "SHARED_MEMORY", tmp_path / "none")
    assert memory_forecast.scarce_shared_memory() == []
