"""The folder of a run: its files, and the lock that lets one driver write them.

runs/NAME/  config.yaml (resolved)  prompts.json  metrics.jsonl  events.jsonl  rollouts/*.jsonl  evaluations/*.jsonl
            checkpoints/step_N/  model/  tensorboard/  logs/attempt_K/  status.json  report.html  lock
"""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Literal, Self

from pydantic import TypeAdapter, ValidationError

from rlhf.errors import CheckpointError, ConfigError
from rlhf.orchestrator.run.files import append_json, keep_lines, overwrite_text, write_json, write_rows, write_text
from rlhf.orchestrator.run.responses import StepResponses, response_rows
from rlhf.types import Json

Resume = Literal[False, True, "auto"]
"""Whether a run continues: `auto` where its folder has a checkpoint."""
MOST_OF_ERROR = 1000
"""Characters of an error in a status.json that must fit into one block of a full disk."""
PRIVATE = 0o700
LOCK = "lock"
PROCESSES = "processes.json"
CHECKPOINTS = "checkpoints"
TRIAL = "trial-"
"""How the name of a folder begins that a launch makes in the run's and removes again."""


class Status(StrEnum):
    """The state of a run."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    PREEMPTED = "preempted"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProcess:
    """A row of processes.json: one of a launch's processes."""

    name: str
    host: str
    node_id: str
    device: str
    pid: int
    stacks: str
    """The file for its stacks: its name where it is written, its path where it is read."""


class RunDirectory:
    """The folder of a run, locked by one driver at a time. Use `open`."""

    def __init__(self, path: Path, lock: int, *, resumes: bool) -> None:
        self.path = path
        self.resumes = resumes
        """Whether the run continues from a checkpoint."""
        self._lock = lock
        self.attempt = 1 + max((_number(entry) for entry in self.logs.glob("attempt_*")), default=0)

    @classmethod
    def open(cls, path: Path, *, resume: Resume) -> Self:
        """Make the folder of a new run, or lock that of a run to continue.

        Raises ConfigError where the folder does not fit `resume`, or where another driver has locked it;
        CheckpointError where it cannot be written. A folder that does not fit is left as it is.
        """
        if not (path / LOCK).exists():
            require_kind(path, resume)
        try:
            path.mkdir(parents=True, exist_ok=True, mode=PRIVATE)
            path.chmod(PRIVATE)
            lock = _lock(path)
            try:
                run = cls(path, lock, resumes=require_kind(path, resume))
            except ConfigError:
                os.close(lock)
                raise
            for folder in (run.rollouts, run.checkpoints, run.tensorboard, run.log_folder):
                folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from error
        for left in path.glob(f"{TRIAL}*"):  # by a launch that was killed: as large as the model
            shutil.rmtree(left, ignore_errors=True)
        if not run.resumes:
            run.rewind(-1)
        return run

    def close(self) -> None:
        """Unlock the folder."""
        os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One line a step."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """Events beside steps: checkpoints, warnings, resumes."""
        return self.path / "events.jsonl"

    @property
    def rollouts(self) -> Path:
        """Folder of every sampled response, one file a step."""
        return self.path / "rollouts"

    @property
    def evaluations(self) -> Path:
        """Folder of the responses to held-out prompts, one file an evaluation. Made by the first one."""
        return self.path / "evaluations"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / CHECKPOINTS

    @property
    def model(self) -> Path:
        """Folder of the trained model in Hugging Face format."""
        return self.path / "model"

    @property
    def report(self) -> Path:
        """The page about the run, written at its end."""
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard files."""
        return self.path / "tensorboard"

    @property
    def logs(self) -> Path:
        """Folder of the attempts' log folders."""
        return self.path / "logs"

    @property
    def log_folder(self) -> Path:
        """Folder for the logs of this launch of the driver."""
        return self.logs / f"attempt_{self.attempt}"

    def write_config(self, text: str) -> None:
        """Save the resolved config."""
        write_text(self.config, text)

    def note(self, kind: str, text: str, **more: Json) -> None:
        """Add a line to events.jsonl."""
        append_json(self.events, {"time": time.time(), "kind": kind, "text": text, **more})

    @property
    def processes(self) -> Path:
        """The processes of this launch and their machines."""
        return self.log_folder / PROCESSES

    def write_processes(self, processes: Sequence[RunProcess]) -> None:
        """Record the processes of this launch."""
        write_text(self.processes, json.dumps([asdict(process) for process in processes], indent=1) + "\n")

    def write_status(self, status: Status, *, step: int, num_steps: int, error: str | None = None) -> None:
        """Record the state of the run. On a full disk it is written over the last one, whose blocks are there.

        Raises CheckpointError where that fails too.
        """
        path = self.path / "status.json"
        value: dict[str, Json] = {
            "status": status,
            "step": step,
            "num_steps": num_steps,
            "error": error,
            "attempt": self.attempt,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": time.time(),
        }
        try:
            write_json(path, value)
        except CheckpointError:
            if not path.exists():
                raise
            short = None if error is None else error[:MOST_OF_ERROR]
            overwrite_text(path, json.dumps({**value, "error": short}))

    def read_status(self) -> Status | None:
        """The last recorded state of the run; None where it cannot be read."""
        try:
            return Status(json.loads((self.path / "status.json").read_text())["status"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write_responses(self, step: int, responses: StepResponses) -> None:
        """Record every response that a step sampled, with its reward: those that were learned from and those of its
        evaluation in a file each. No file where there are none."""
        name = f"step_{step:06d}.jsonl"
        if responses.trained:
            write_rows(self.rollouts / name, response_rows(step, responses.trained, responses.advantages))
        if responses.evaluated:
            write_rows(self.evaluations / name, response_rows(step, responses.evaluated, {}))

    def rewind(self, step: int) -> None:
        """Drop what was recorded past the step that the run continues from."""
        keep_lines(self.metrics, step)
        for file in (*self.rollouts.glob("step_*.jsonl"), *self.evaluations.glob("step_*.jsonl")):
            if _number(file) > step:
                file.unlink()


def newest_processes(folder: Path) -> list[RunProcess]:
    """The processes of the last launch; empty where there was none, or where they cannot be read."""
    files = sorted(folder.glob(f"logs/attempt_*/{PROCESSES}"), key=lambda file: _number(file.parent))
    if not files:
        return []
    try:
        found = TypeAdapter(list[RunProcess]).validate_json(files[-1].read_bytes())
    except (OSError, ValidationError):
        return []
    return [replace(process, stacks=str(files[-1].parent / process.stacks)) for process in found]


def _number(path: Path) -> int:
    """The number at the end of a name like attempt_3 or step_000012.jsonl; 0 where there is none."""
    found = re.search(r"_(\d+)$", path.name.split(".")[0])
    return int(found[1]) if found else 0


def require_kind(path: Path, resume: Resume) -> bool:
    """Whether a run in the folder `path`, which may not exist yet, continues from a checkpoint. A run that died before
    its first checkpoint may be started again.

    Raises:
        ConfigError: the folder is not a run's, has no checkpoint to resume, or has one and `resume` is false.
    """
    _require_ours(path)
    has_checkpoints = any((path / CHECKPOINTS).glob("step_*"))
    if resume in ("auto", has_checkpoints):
        return has_checkpoints
    if resume:
        raise ConfigError(f"{path}: no run to resume. Leave out --resume to start it, or set it to auto")
    raise ConfigError(f"{path}: holds a run already. Continue it with --resume, or choose another run.name")


def require_writable(path: Path, room: int) -> None:
    """Check that the folder of a run, which may not exist yet, can be written, with `room` bytes free.

    Raises:
        CheckpointError: it cannot, or the disk has less room.
    """
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    try:
        with TemporaryDirectory(dir=there, prefix=".rlhf-"):
            free = shutil.disk_usage(there).free
    except OSError as error:
        raise CheckpointError(f"run.dir: {there}: cannot be written ({error.strerror or error})") from error
    if free < room:
        raise CheckpointError(
            f"run.dir: {there} has {free / 1e6:.3g} MB free; the first checkpoint, the model and the records of this "
            f"run need {room / 1e6:.3g} MB or more. Make room, or name another folder"
        )


def _require_ours(path: Path) -> None:
    """Refuse a folder that is not a run's."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: exists and is not a folder")
    if path.exists() and any(path.iterdir()) and not (path / LOCK).exists():
        raise ConfigError(f"{path}: exists and is not an rlhf run. Choose another run.name or run.dir")


def require_unlocked(path: Path) -> None:
    """Raise ConfigError where another driver uses the folder of a run. The folder may not exist; nothing is changed."""
    try:
        with (path / LOCK).open("rb+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN) and (path / LOCK).is_file() and os.access(path / LOCK, os.W_OK):
            holder = _describe_holder(path / "lock_holder.json")
            raise ConfigError(f"{path}: in use by {holder}. Stop it first, or choose another run.name") from error


def _lock(path: Path) -> int:
    """Hold the folder until the descriptor is closed or this process ends, however it ends. A child that was forked
    does not inherit it."""
    lock, info = path / LOCK, path / "lock_holder.json"
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            text = f"{path}: cannot be locked ({error.strerror}). Choose a run.dir on a file system with locks"
            raise CheckpointError(text) from error
        raise ConfigError(
            f"{path}: in use by {_describe_holder(info)}. Stop it first, or choose another run.name"
        ) from error
    try:
        write_json(info, {"pid": os.getpid(), "host": socket.gethostname(), "start": time.strftime("%F %T")})
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _describe_holder(info: Path) -> str:
    try:
        holder = json.loads(info.read_text())
        return f"pid {holder['pid']} on {holder['host']} since {holder['start']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another driver"
