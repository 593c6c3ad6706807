"""Disk errors of a collective save, collected on each rank and raised on all ranks at the end.

If one rank raised in the middle of a collective save, the others would wait for it, and its next collective would be
matched with theirs. So every rank continues to the end, and then all of them raise.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from rlhf.errors import CheckpointError

WRITER = re.compile(r"inline_container|PytorchStreamWriter|failed writing|iostream error", re.IGNORECASE)
"""Matches the RuntimeErrors that torch's file writer raises."""
FULL = (errno.ENOSPC, errno.EDQUOT)
PROBE_BYTES = 2**20


class WriteErrors:
    """The first write error of this rank, if there is one."""

    def __init__(self) -> None:
        self._first: str | None = None

    @contextmanager
    def collected(self, path: Path, num_bytes: int = 0) -> Iterator[None]:
        """A write error inside this block, which writes `path` with about `num_bytes`, ends the block, and is kept for
        `raise_if_any`."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            self._add(error, path, num_bytes)
        except RuntimeError as error:
            if not WRITER.search(str(error)):
                raise
            self._add(error, path, num_bytes)

    @property
    def first(self) -> str | None:
        """The first write error of this rank."""
        return self._first

    def raise_if_any(self, what: str) -> None:
        """Raise CheckpointError on every rank if any rank had a write error. `what` begins the message. Collective."""
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, self._first)
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None]
        if failed:
            raise CheckpointError(f"{what}: cannot be written ({'; '.join(failed)})")

    def _add(self, error: Exception, path: Path, num_bytes: int) -> None:
        text = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
        # Writers in C++ report what they noticed, such as an unexpected position in the file. The disk says why.
        refusal = refusal_of_disk(path.parent)
        said = text if refusal is None else refusal.strerror or text
        full = next((meaning for meaning in map(os.strerror, FULL) if meaning in f"{said} {text}"), None)
        if full is not None:
            free = shutil.disk_usage(path.parent).free
            room = f"needs about {num_bytes / 1e6:.3g} MB, " if num_bytes else ""
            said = f"disk full ({full}): {path} {room}{free / 1e6:.3g} MB are free"
        self._first = self._first or said


def refusal_of_disk(folder: Path) -> OSError | None:
    """Why a file of `PROBE_BYTES` cannot be written to `folder`; None if it can."""
    try:
        with TemporaryFile(dir=folder) as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def tensor_bytes(value: object) -> int:
    """Bytes of the tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0
