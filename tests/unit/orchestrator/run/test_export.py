"""A reader of the exported model sees the old one or the new one, whenever a run is killed."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import cast

import pytest

from rlhf.engines.base import TrainEngine
from rlhf.errors import CheckpointError
from rlhf.orchestrator.run.export import export_model

FILES = ("config.json", "model.safetensors")


class Killed(BaseException):
    """Ends a process wherever it is."""


class Writer:
    """Exports its name as every file of a model, and counts what it does on the disk."""

    def __init__(self, name: str, killed_at: int = -1) -> None:
        self._name = name
        self._killed_at = killed_at
        self.acts = 0

    def act(self) -> None:
        if self.acts == self._killed_at:
            raise Killed
        self.acts += 1

    def export(self, directory: Path) -> None:
        for file in FILES:
            self.act()
            (directory / file).write_text(self._name)


def export(writer: Writer, directory: Path) -> None:
    export_model(cast(TrainEngine, writer), directory)


def killing(writer: Writer, act: Callable[..., object]) -> Callable[..., object]:
    def killed_or_done(*arguments: object) -> object:
        writer.act()
        return act(*arguments)

    return killed_or_done


def read(directory: Path) -> set[str]:
    """What the files of an export say; one word if all are of one export."""
    return {(directory / file).read_text() for file in FILES}


def killed_export(directory: Path, killed_at: int) -> int:
    """Export "new" and be killed before an act on the disk; returns how many acts there were."""
    writer = Writer("new", killed_at)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", killing(writer, Path.rename))
        patch.setattr(shutil, "rmtree", killing(writer, shutil.rmtree))
        with suppress(Killed):
            export(writer, directory)
    return writer.acts


def test_a_killed_export_leaves_a_whole_model(tmp_path: Path) -> None:
    num_acts = killed_export(tmp_path / "whole", -1)
    for killed_at in range(num_acts + 3):
        model = tmp_path / str(killed_at) / "model"
        model.parent.mkdir()
        export(Writer("old"), model)
        killed_export(model, killed_at)
        between = not model.exists()
        if between:  # the two renames cannot be one: the old export is beside its name
            assert read(model.with_name("model.old")) == {"old"}
            with pytest.raises(CheckpointError, match="the model cannot be written"):
                export(cast(Writer, Refused()), model)
        assert read(model) in ({"old"}, {"new"})
        export(Writer("newest"), model)
        assert read(model) == {"newest"}
        assert sorted(path.name for path in model.parent.iterdir()) == ["model"]


def test_an_export_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut after the rename would otherwise leave a folder of empty files."""
    seen: list[str] = []

    def flush(descriptor: int) -> None:
        seen.append(str(Path(f"/proc/self/fd/{descriptor}").readlink().relative_to(tmp_path)))

    def rename(path: Path, target: Path) -> None:
        seen.append(f"{path.name} -> {target.name}")
        path.replace(target)

    export(Writer("old"), tmp_path / "model")
    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", rename)
    export(Writer("new"), tmp_path / "model")
    renamed = seen.index("model.tmp -> model")
    assert {*seen[:renamed]} == {*(f"model.tmp/{file}" for file in FILES), "model.tmp", "model -> model.old"}
    assert seen[renamed + 1 :] == ["."]


class Refused:
    def export(self, directory: Path) -> None:
        raise OSError(28, "No space left on device", str(directory))


def test_an_export_that_the_disk_refuses_leaves_the_old_one(tmp_path: Path) -> None:
    export(Writer("old"), tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"the model cannot be written: No space left on device\. Every step is"):
        export(cast(Writer, Refused()), tmp_path / "model")
    assert read(tmp_path / "model") == {"old"}
