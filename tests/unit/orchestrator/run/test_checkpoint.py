"""Checkpoints: whole or not there, whatever happens to the disk."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf.engines.fakes import FakeTrainEngine
from rlhf.errors import CheckpointError, StallError
from rlhf.orchestrator.run.checkpoint import Checkpoints, RunState, peek, sha256_of
from rlhf.repair import Repair, RepairKind
from rlhf.types import Head, Role

STATE = RunState(step=0, seed=7, algorithm={"kl": {"coef": 0.1}}, config={"algo": {"type": "ppo"}})
Engines = dict[Role, FakeTrainEngine]


class Setup:
    """Checkpoints with the warnings they gave."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.warnings: list[str] = []
        self.checkpoints = Checkpoints(folder, keep=keep, warn=self.warnings.append, repaired=self.repaired)
        self.engines: Engines = {
            Role.POLICY: FakeTrainEngine(np.zeros(4), Head.LOG_PROBS),
            Role.CRITIC: FakeTrainEngine(np.zeros(4), Head.VALUES),
        }

    def repaired(self, repair: Repair) -> None:
        assert repair.kind is RepairKind.CHECKPOINT
        self.warnings.append(repair.text)

    def save(self, step: int) -> Path:
        self.engines[Role.POLICY].table[0] = step
        return self.checkpoints.save(replace(STATE, step=step, position=step * 10), self.engines)


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    made = Setup(tmp_path / "a" / "checkpoints")
    made.save(1)
    made.save(2)
    return made


def test_what_was_saved_comes_back(setup: Setup) -> None:
    path, state = setup.checkpoints.newest()
    assert path.name == "step_2"
    assert state == replace(STATE, step=2, position=20)
    engine = FakeTrainEngine(np.zeros(4), Head.LOG_PROBS)
    engine.load(path / "policy")
    assert engine.table[0] == 2
    assert setup.warnings == []


NUM_TORTURES = int(os.environ.get("RLHF_TEST_TORTURES", "40"))
FILES = ["manifest.json", "state.json", "policy/engine.npz", "critic/engine.npz"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", range(16))
def test_a_truncated_file_is_seen(setup: Setup, name: str, part: int) -> None:
    file = setup.checkpoints.newest()[0] / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size * part // 16])
    assert setup.checkpoints.newest()[0].name == "step_1"
    assert len(setup.warnings) == 1
    assert "step_2" in setup.warnings[0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "cannot be read (RecursionError)"),
        (b"\xff", "cannot be read (UnicodeDecodeError)"),
        (b'{"format": 1', "cannot be read (JSONDecodeError)"),
        (b"[]", "is not an object"),
        (b"null", "is not an object"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_a_reason_to_use_the_older_one(
    setup: Setup, content: bytes, reason: str
) -> None:
    (setup.checkpoints.newest()[0] / "manifest.json").write_bytes(content)
    assert setup.checkpoints.newest()[0].name == "step_1"
    assert setup.warnings == [f"step_2: manifest.json {reason}; not used"]


@pytest.mark.parametrize("name", FILES[1:])
def test_one_flipped_bit_is_seen_and_the_file_is_named(setup: Setup, name: str) -> None:
    file = setup.checkpoints.newest()[0] / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    assert setup.checkpoints.newest()[0].name == "step_1"
    assert setup.warnings == [f"step_2: {name} wrong sha256; not used"]


@pytest.mark.parametrize("name", FILES)
def test_a_lost_file_is_seen(setup: Setup, name: str) -> None:
    (setup.checkpoints.newest()[0] / name).unlink()
    assert setup.checkpoints.newest()[0].name == "step_1"


def test_shards_of_two_steps_do_not_mix(setup: Setup) -> None:
    newest = setup.checkpoints.newest()[0]
    shutil.copy(newest.parent / "step_1/policy/engine.npz", newest / "policy/engine.npz")
    assert setup.checkpoints.newest()[0].name == "step_1"


def test_a_renamed_checkpoint_is_not_of_that_step(setup: Setup) -> None:
    newest = setup.checkpoints.newest()[0]
    newest.rename(newest.with_name("step_9"))
    assert setup.checkpoints.newest()[0].name == "step_1"


@pytest.mark.parametrize("entry", ["../outside", "/etc/passwd", "policy/../../outside"])
def test_a_manifest_cannot_point_outside(setup: Setup, entry: str) -> None:
    newest = setup.checkpoints.newest()[0]
    (newest.parent / "outside").write_text("secret")
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][entry] = {"size": 6, "sha256": sha256_of(newest.parent / "outside")}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert setup.checkpoints.newest()[0].name == "step_1"
    assert f'step_2/manifest.json: entry "{entry}" outside the checkpoint' in setup.warnings[0]


@pytest.mark.parametrize("name", ["policy", "policy/engine.npz"])
def test_a_link_is_not_followed(setup: Setup, name: str) -> None:
    path = setup.checkpoints.newest()[0] / name
    moved = path.parents[len(Path(name).parts)] / "moved"
    path.rename(moved)
    path.symlink_to(moved)
    assert setup.checkpoints.newest()[0].name == "step_1"
    assert "outside the checkpoint" in setup.warnings[0]


def test_a_peek_is_at_the_newest_that_has_a_manifest_and_a_state(setup: Setup) -> None:
    folder = setup.checkpoints.newest()[0].parent
    setup.save(10)  # 2 and 10 are left, of which 2 comes last by name
    state = peek(folder)
    assert state is not None
    assert state.step == 10
    (folder / "step_10/policy/engine.npz").unlink()  # not looked at
    assert peek(folder) == state
    (folder / "step_10/state.json").write_text("[]")
    assert (older := peek(folder)) is not None
    assert older.step == 2
    (folder / "step_2/manifest.json").unlink()
    assert peek(folder) is None
    assert peek(folder / "nowhere") is None


def test_none_whole_is_an_error_and_never_a_fresh_start(setup: Setup) -> None:
    for folder in setup.checkpoints.newest()[0].parent.iterdir():
        (folder / "manifest.json").write_text("")
    with pytest.raises(CheckpointError, match=r"a: 2 checkpoints, none complete") as caught:
        setup.checkpoints.newest()
    assert caught.value.exit_code == 5
    assert len(setup.warnings) == 2


def test_a_newer_format_is_not_passed_over(setup: Setup) -> None:
    manifest = setup.checkpoints.newest()[0] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 3'))
    with pytest.raises(CheckpointError, match="step_2: format 3, this version reads 1; update rlhf"):
        setup.checkpoints.newest()


def test_folders_that_are_no_checkpoints_are_ignored_with_one_warning(setup: Setup) -> None:
    newest = setup.checkpoints.newest()[0]
    for name in ("step_0400", "step_4e2", "step_-1"):
        shutil.copytree(newest, newest.with_name(name))
    assert setup.checkpoints.newest()[0].name == "step_2"
    setup.save(3)  # looks for checkpoints again
    assert ["step_-1, step_0400, step_4e2" in text for text in setup.warnings] == [True]


def test_times_and_clocks_do_not_matter(setup: Setup) -> None:
    newest = setup.checkpoints.newest()[0]
    for path in newest.parent.rglob("*"):
        os.utime(path, (0, 2**31 if "step_1" in path.parts else 0))
    assert setup.checkpoints.newest()[0] == newest


def test_a_stale_temporary_folder_is_ignored_and_cleared(setup: Setup) -> None:
    newest = setup.checkpoints.newest()[0]
    shutil.copytree(newest, newest.with_name("tmp-step_9"))
    assert setup.checkpoints.newest()[0] == newest
    setup.save(3)
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step_2", "step_3"]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(setup: Setup) -> None:
    newest = setup.checkpoints.newest()[0]
    (newest / "state.json").write_text("{}")
    setup.save(2)
    assert setup.checkpoints.newest()[0].name == "step_2"


class Disk(FakeTrainEngine):
    """An engine whose disk fills up while it saves."""

    error: OSError = OSError(errno.ENOSPC, "No space left on device")

    def save(self, directory: Path) -> None:
        (directory / "half").write_text("half")
        raise self.error


def test_a_full_disk_keeps_the_older_ones_and_training_goes_on_until_the_third_time(setup: Setup) -> None:
    setup.engines[Role.CRITIC] = Disk(np.zeros(4), Head.VALUES)
    for step in (3, 4):
        assert setup.checkpoints.try_save(replace(STATE, step=step), setup.engines) is None
    assert "No space left on device. Older checkpoints are kept" in setup.warnings[-1]
    path, state = setup.checkpoints.newest()
    assert (path.name, state.step) == ("step_2", 2)
    assert sorted(child.name for child in path.parent.iterdir()) == ["step_1", "step_2"]
    with pytest.raises(CheckpointError, match="3 checkpoints in a row failed"):
        setup.checkpoints.try_save(replace(STATE, step=5), setup.engines)


def test_failures_are_counted_from_the_last_save_that_worked(setup: Setup) -> None:
    full: Engines = {Role.POLICY: Disk(np.zeros(4), Head.LOG_PROBS)}
    for step, engines in enumerate([full, full, setup.engines, full, full], start=3):
        saved = setup.checkpoints.try_save(replace(STATE, step=step), engines)
        assert (saved is None) == (engines is full)
    with pytest.raises(CheckpointError, match="3 checkpoints in a row failed"):
        setup.checkpoints.try_save(replace(STATE, step=8), full)


def test_a_stalled_engine_is_not_taken_for_a_full_disk(setup: Setup) -> None:
    disk = Disk(np.zeros(4), Head.VALUES)
    disk.error = StallError("critic did not answer")  # StallError is a TimeoutError, which is an OSError
    setup.engines[Role.CRITIC] = disk
    with pytest.raises(StallError):
        setup.checkpoints.try_save(replace(STATE, step=3), setup.engines)


def test_free_space_is_checked_before_writing(setup: Setup) -> None:
    folder = setup.checkpoints.newest()[0].parent
    full = Checkpoints(folder, keep=2, warn=setup.warnings.append, repaired=setup.repaired, free_bytes=lambda _: 100)
    with pytest.raises(CheckpointError, match=r"needs about \S+ GB, 1e-07 GB free in"):
        full.save(replace(STATE, step=3), setup.engines)
    assert full.newest()[0].name == "step_2"


@pytest.mark.parametrize(("free", "is_warned"), [(10**6, False), (100, True)])
def test_the_first_save_warns_of_a_disk_that_will_be_too_small(tmp_path: Path, free: int, is_warned: bool) -> None:
    setup = Setup(tmp_path)
    setup.checkpoints = Checkpoints(
        tmp_path, keep=2, warn=setup.warnings.append, repaired=setup.repaired, free_bytes=lambda _: free
    )
    setup.save(0)
    assert [text for text in setup.warnings if "2 more of" in text and "lower checkpoint.keep" in text] == (
        setup.warnings if is_warned else []
    )
    assert bool(setup.warnings) is is_warned


@pytest.mark.parametrize("num_updates", [0, 1])
def test_the_first_checkpoint_with_moments_is_three_times_as_large(tmp_path: Path, num_updates: int) -> None:
    setup = Setup(tmp_path)
    first = setup.checkpoints.save(replace(STATE, step=0, num_updates=num_updates), setup.engines)
    size = sum(file.stat().st_size for file in first.rglob("*") if file.is_file())
    needed = size * (3 if num_updates == 0 else 1)
    free = int(needed * 1.2) - 1
    tight = Checkpoints(
        tmp_path, keep=2, warn=setup.warnings.append, repaired=setup.repaired, free_bytes=lambda _: free
    )
    with pytest.raises(CheckpointError, match="needs about"):
        tight.save(replace(STATE, step=1), setup.engines)
    free += 1
    tight.save(replace(STATE, step=1), setup.engines)


def test_the_first_warning_counts_the_moments(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.checkpoints = Checkpoints(
        tmp_path, keep=2, warn=setup.warnings.append, repaired=setup.repaired, free_bytes=lambda _: 0
    )
    first = setup.checkpoints.save(replace(STATE, step=0, num_updates=0), setup.engines)
    size = sum(file.stat().st_size for file in first.rglob("*") if file.is_file())
    assert f"2 more of {3 * size / 1e9:.3g} GB need {6 * size / 1e9:.3g} GB" in setup.warnings[-1]


def test_an_older_one_goes_only_after_the_newer_is_whole(tmp_path: Path) -> None:
    setup = Setup(tmp_path, keep=1)
    setup.save(1)
    setup.engines[Role.CRITIC] = Disk(np.zeros(4), Head.VALUES)
    with pytest.raises(CheckpointError):
        setup.save(2)
    assert setup.checkpoints.newest()[0].name == "step_1"
    setup.engines[Role.CRITIC] = FakeTrainEngine(np.zeros(4), Head.VALUES)
    setup.save(3)
    assert [path.name for path in tmp_path.iterdir()] == ["step_3"]


def test_an_older_one_that_cannot_be_removed_does_not_fail_the_save(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, **_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", path)

    monkeypatch.setattr(os, "rmdir", refuse)
    assert setup.save(3).name == "step_3"
    assert setup.checkpoints.newest()[1].step == 3


class Flushes:
    """Every file and folder that is flushed, by name, with its size at that moment. `then` is called after each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, then: Callable[[str], None] = lambda path: None) -> None:
        self.sizes: dict[str, int] = {}
        flush = os.fsync

        def fsync(descriptor: int) -> None:
            flush(descriptor)
            path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            self.sizes[path] = os.fstat(descriptor).st_size
            then(path)

        monkeypatch.setattr(os, "fsync", fsync)


def test_everything_is_flushed_before_the_rename_and_the_rename_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(tmp_path)
    is_renamed: dict[str, bool] = {}
    flushes = Flushes(monkeypatch, lambda path: is_renamed.update({path: (tmp_path / "step_1").exists()}))
    saved = setup.save(1)
    temporary = tmp_path / "tmp-step_1"
    for path in (saved, *saved.rglob("*")):
        was = temporary / path.relative_to(saved)
        if path.parent == saved and path.suffix == ".json":
            was = was.with_name(f".{was.name}.tmp")  # itself renamed once it is flushed
        assert is_renamed[str(was)] is False, f"{was} was not flushed before the checkpoint got its name"
        if path.is_file():
            assert flushes.sizes[str(was)] == path.stat().st_size, f"{was} was flushed before all of it was written"
    assert is_renamed[str(tmp_path)] is True, "the new name was not flushed"


def test_a_save_that_the_disk_damages_is_noticed_at_once(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = setup.checkpoints.newest()[0].parent

    def damage(path: str) -> None:
        if path == str(folder) and (file := folder / "step_3/policy/engine.npz").exists():
            file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])

    Flushes(monkeypatch, damage)
    with pytest.raises(CheckpointError, match=r"step_3: policy/engine\.npz wrong sha256"):
        setup.save(3)
    assert {path.name for path in folder.iterdir()} >= {"step_1", "step_2"}, "older ones go after a good one"
    assert setup.checkpoints.newest()[0].name == "step_2"


@pytest.mark.timeout(600)
def test_killed_at_any_moment_or_out_of_disk_at_any_byte_the_newest_is_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.unit.orchestrator.run.torture", str(tmp_path / "c"), str(NUM_TORTURES), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cut_off, full = map(int, done.stdout.split())
    assert cut_off > NUM_TORTURES // 4, "most kills came between saves"
    assert full > NUM_TORTURES // 4, "the disk was hardly ever full"


def test_a_checkpoint_just_saved_outlives_damaged_later_ones(tmp_path: Path) -> None:
    """As they lie there when a run goes on from an earlier one, with fewer to keep."""
    setup = Setup(tmp_path, keep=3)
    for step in (10, 20, 30):
        setup.save(step)
    for step in (20, 30):
        (tmp_path / f"step_{step}" / "manifest.json").write_text("")
    setup = Setup(tmp_path, keep=2)
    assert setup.checkpoints.newest()[0].name == "step_10"
    setup.save(12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_12"]
    assert setup.checkpoints.newest()[0].name == "step_12"


class ElsewhereEngine(FakeTrainEngine):
    """Its node does not see the folder: nothing arrives there."""

    def save(self, directory: Path) -> None: ...


def test_the_first_save_finds_a_folder_that_nodes_do_not_share(tmp_path: Path) -> None:
    setup = Setup(tmp_path)
    setup.engines[Role.CRITIC] = ElsewhereEngine(np.zeros(4), Head.VALUES)
    with pytest.raises(CheckpointError, match=r"critic wrote nothing .*: set run\.dir to a folder that all nodes"):
        setup.save(1)
    assert not list(tmp_path.iterdir())
