"""Disk errors of a collective save, collected on each rank and raised on all ranks at the end.

If one rank raised in the middle of a collective save, the others would wait for it, and its next collective would be
matched with theirs. So every rank continues to the end, and then all of them raise.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from safetensors import SafetensorError

from rlhf.errors import CheckpointError

WRITER = re.compile(r"inline_container|PytorchStreamWriter|failed writing|iostream error", re.IGNORECASE)
"""Matches the RuntimeErrors that torch's file writer raises."""


class WriteErrors:
    """The first write error of this rank, if there is one."""

    def __init__(self) -> None:
        self._first: str | None = None

    @contextmanager
    def collected(self) -> Iterator[None]:
        """A write error inside this block ends the block, and is kept for `raise_if_any`."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            self._add(error)
        except RuntimeError as error:
            if not WRITER.search(str(error)):
                raise
            self._add(error)

    def raise_if_any(self, what: str) -> None:
        """Raise CheckpointError on every rank if any rank had a write error. `what` begins the message. Collective."""
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, self._first)
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None]
        if failed:
            raise CheckpointError(f"{what}: cannot be written ({'; '.join(failed)})")

    def _add(self, error: Exception) -> None:
        text = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
        self._first = self._first or text
