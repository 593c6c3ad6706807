"""Checkpoints that are either complete or ignored.

Commit: every role and the driver's state are written into a temporary folder and flushed, then a manifest with size
and sha256 of each file, then one rename makes the folder `step_N`. A crash anywhere leaves the older ones as they
were. Clocks and file times play no part.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from rlhf.engines.base import TrainEngine
from rlhf.errors import CheckpointError, RlhfError
from rlhf.orchestrator.run.files import sync_path, write_json
from rlhf.repair import Repair, Repaired, RepairKind
from rlhf.types import Json, Role

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
NAME = re.compile(r"step_(0|[1-9][0-9]*)")
TEMPORARY = "tmp-"
SPARE_ROOM = 1.2
"""A new checkpoint must find this many times its expected size free."""
WITH_MOMENTS = 3
"""A checkpoint is this many times as large once the optimizer has made a step: only then are there two moments to each
weight."""
MAX_FAILURES_IN_A_ROW = 3

FILES_AT_ONCE = 8
"""Files that are flushed and hashed at the same time. One thread hashes 1.4 GB a second, and training waits."""

T = TypeVar("T")
R = TypeVar("R")
Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What the driver must restore to continue a run. Every random choice is a pure function of `seed` and the step."""

    step: int
    """Finished steps of the loop; also the version of the policy's weights."""
    seed: int
    position: int = 0
    """Where the next step reads the data set."""
    ahead: tuple[int, ...] = ()
    """Rows after `position` that are used already: asynchronous rollouts learn from what is complete first."""
    pretraining_position: int = 0
    num_updates: int = 0
    """Optimizer steps applied so far, over all roles."""
    recent_updates: dict[str, str] = field(default_factory=dict)
    """Of each role, its newest updates in order, one character each: s where it was skipped."""
    algorithm: dict[str, Json] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    """Processes of each trained role."""
    config: dict[str, Json] = field(default_factory=dict)
    data_fingerprint: str = ""
    token_limit: int = 0
    """The most tokens of a micro-batch since memory ran out with larger ones; 0 if it did not."""
    threads: str = ""
    """OMP_NUM_THREADS of every process that computes with a model on CPUs: it decides how sums are rounded."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        warn: Warn,
        repaired: Repaired,
        free_bytes: Callable[[Path], int] = lambda f: shutil.disk_usage(f).free,
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._warn = warn
        self._repaired = repaired
        self._free_bytes = free_bytes
        self._failures_in_a_row = 0
        self._named: set[str] = set()
        """What a warning has named that only looks like a checkpoint."""

    def save(self, state: RunState, engines: Mapping[Role, TrainEngine]) -> Path:
        """Commit a checkpoint, verify it, then drop the oldest. Raises CheckpointError, with nothing half done left."""
        final = self._folder / f"step_{state.step}"
        temporary = self._folder / f"{TEMPORARY}step_{state.step}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            is_first = not self._found()
            self._require_room()
            self._clear_temporary()
            _write(temporary, state, engines)
            if final.exists():  # one that resuming found damaged, or left behind
                shutil.rmtree(final)
            temporary.rename(final)
            sync_path(self._folder)
            verify(final)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, RlhfError):
                raise
            raise CheckpointError(f"checkpoint: {final}: {error.strerror or error}") from error
        self._failures_in_a_row = 0
        self._retire(final)
        if is_first:
            self._warn_of_little_room(final)
        return final

    def try_save(self, state: RunState, engines: Mapping[Role, TrainEngine]) -> Path | None:
        """As `save`, but training goes on without one; three failures in a row raise."""
        try:
            return self.save(state, engines)
        except CheckpointError as error:
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                raise CheckpointError(f"{error} ({self._failures_in_a_row} checkpoints in a row failed)") from error
            self._warn(f"{error}. Older checkpoints are kept; the next interval tries again")
            return None

    def newest(self) -> tuple[Path, RunState]:
        """The newest whole checkpoint; says which newer ones it skipped, and why."""
        found = self._found()
        for path in found:
            try:
                return path, verify(path)
            except NewerFormatError:
                raise
            except CheckpointError as error:
                self._repaired(Repair(kind=RepairKind.CHECKPOINT, where=str(path), text=f"{error}; not used"))
        raise CheckpointError(f"{self._folder.parent}: {len(found)} checkpoints, none complete")

    def _found(self) -> list[Path]:
        """Checkpoint folders, newest first. A warning names what only looks like one, once."""
        entries = sorted(self._folder.iterdir()) if self._folder.is_dir() else []
        strange = [
            e.name for e in entries if e.name.startswith("step_") and (not NAME.fullmatch(e.name) or e.is_symlink())
        ]
        if not self._named.issuperset(strange):
            self._named.update(strange)
            self._warn(f"{self._folder}: ignored, not checkpoints of this run: {', '.join(strange)}")
        good = [e for e in entries if NAME.fullmatch(e.name) and e.is_dir() and not e.is_symlink()]
        return sorted(good, key=lambda path: int(path.name.removeprefix("step_")), reverse=True)

    def _retire(self, saved: Path) -> None:
        """Drop checkpoints past the newest `keep`. `saved`, which was verified, is the newest that counts: later ones
        were found damaged when the run continued from an earlier one."""
        found = self._found()
        at = found.index(saved)
        for path in (*found[:at], *found[at + self._keep :]):
            shutil.rmtree(path, ignore_errors=True)

    def _clear_temporary(self) -> None:
        for path in self._folder.glob(f"{TEMPORARY}step_*"):
            shutil.rmtree(path)

    def _warn_of_little_room(self, first: Path) -> None:
        """Warn at the first checkpoint where the disk will be full after hours: `keep` more are written before the
        oldest is removed."""
        size = _size_of_next(first)
        needed, free = size * self._keep, self._free_bytes(self._folder)
        if free < needed:
            self._warn(
                f"checkpoint: {self._keep} more of {size / 1e9:.3g} GB need {needed / 1e9:.3g} GB, "
                f"{free / 1e9:.3g} GB free in {self._folder}: lower checkpoint.keep, or make room"
            )

    def _require_room(self) -> None:
        found = self._found()
        if not found:
            return
        needed, free = int(_size_of_next(found[0]) * SPARE_ROOM), self._free_bytes(self._folder)
        if free < needed:
            raise CheckpointError(
                f"checkpoint: needs about {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB free in {self._folder}"
            )


def _size_of_next(newest: Path) -> int:
    """Bytes that the next checkpoint will have, by the newest one."""
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    with suppress(CheckpointError):  # a damaged one still has a size
        if not _read_state(newest).num_updates:
            return size * WITH_MOMENTS
    return size


class NewerFormatError(CheckpointError):
    """A checkpoint was written by a newer version of this package."""


def _write(folder: Path, state: RunState, engines: Mapping[Role, TrainEngine]) -> None:
    """Everything of a checkpoint, the manifest last."""
    folder.mkdir()
    for role, engine in engines.items():
        (folder / role).mkdir()
        engine.save(folder / role)
        if not any((folder / role).iterdir()):
            raise CheckpointError(
                f"checkpoint: {role} wrote nothing into {folder / role}, which its node does not see: set run.dir "
                "to a folder that all nodes share"
            )
    write_json(folder / STATE, asdict(state))
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = _of_each(_flushed, paths)
    files: Json = {path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, entries, strict=True)}
    for directory in (path for path in folder.rglob("*") if path.is_dir()):
        sync_path(directory)
    write_json(folder / MANIFEST, {"format": FORMAT, "step": state.step, "files": files})


def _of_each(work: Callable[[T], R], files: Iterable[T]) -> list[R]:
    """What `work` returns for each file, in their order; the first one's error."""
    with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="checkpoint") as threads:
        return list(threads.map(work, files))


def _flushed(file: Path) -> Json:
    """Have the disk keep a file. Returns its entry in the manifest."""
    sync_path(file)
    return {"size": file.stat().st_size, "sha256": sha256_of(file)}


def peek(folder: Path) -> RunState | None:
    """The state of the newest checkpoint in a folder of checkpoints, whose files are not verified; None without one."""
    for path in sorted(folder.glob("step_*"), key=lambda path: path.name.removeprefix("step_").zfill(12), reverse=True):
        if (path / MANIFEST).is_file():
            with suppress(CheckpointError):
                return _read_state(path)
    return None


def verify(folder: Path) -> RunState:
    """Check every file of a checkpoint against its manifest. Raises CheckpointError saying which is wrong."""
    name = folder.name
    manifest = _read_object(folder / MANIFEST, name)
    written_as = manifest.get("format")
    if isinstance(written_as, int) and written_as > FORMAT:
        raise NewerFormatError(f"{name}: format {written_as}, this version reads {FORMAT}; update rlhf")
    files = manifest.get("files")
    if written_as != FORMAT or f"step_{manifest.get('step')}" != name or not isinstance(files, dict) or not files:
        raise CheckpointError(f"{name}: {MANIFEST} is not that of a checkpoint of this step")
    _of_each(partial(_verify_file, folder), files.items())
    if STATE not in files:
        raise CheckpointError(f"{name}: {MANIFEST} lists no {STATE}")
    return _read_state(folder)


def _verify_file(folder: Path, item: tuple[str, Json]) -> None:
    entry, recorded = item
    path = folder / entry
    pure = PurePosixPath(entry)
    inside = not pure.is_absolute() and ".." not in pure.parts
    if not inside or any(part.is_symlink() for part in [path, *path.parents][: len(pure.parts)]):
        raise CheckpointError(f'{folder.name}/{MANIFEST}: entry "{entry}" outside the checkpoint')
    if not isinstance(recorded, dict) or not path.is_file():
        raise CheckpointError(f"{folder.name}: {entry} is missing")
    if path.stat().st_size != recorded.get("size"):
        raise CheckpointError(f"{folder.name}: {entry} has {path.stat().st_size} bytes, not {recorded.get('size')}")
    if sha256_of(path) != recorded.get("sha256"):
        raise CheckpointError(f"{folder.name}: {entry} wrong sha256")


def _read_object(path: Path, name: str) -> dict[str, Json]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: {path.name} cannot be read ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: {path.name} is not an object")
    return value


def _read_state(folder: Path) -> RunState:
    values = _read_object(folder / STATE, folder.name)
    try:
        return RunState(**{**values, "ahead": tuple(values.get("ahead", ()))})  # type: ignore[arg-type]
    except TypeError as error:
        raise CheckpointError(f"{folder.name}: {STATE} is not a run's state ({error})") from error


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
