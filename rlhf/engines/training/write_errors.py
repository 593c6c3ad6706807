"""What a disk refuses while several ranks write: kept until all of them can hear of it.

A rank that raised in the midst of a collective save would leave the others waiting for it, and meet them later in
another collective. So every rank goes on to the end, and then all of them raise.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from safetensors import SafetensorError

from rlhf.errors import CheckpointError

WRITER = re.compile(r"inline_container|PytorchStreamWriter|failed writing|iostream error", re.IGNORECASE)
"""What torch's own writer of files says in its RuntimeErrors."""


class Refusals:
    """The first refusal of this rank, if there was one."""

    def __init__(self) -> None:
        self._first: str | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, what a disk refuses ends the block and no more."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            self._keep(error)
        except RuntimeError as error:
            if not WRITER.search(str(error)):
                raise
            self._keep(error)

    def tell(self, what: str) -> None:
        """Raise CheckpointError on every rank where some were refused. Collective."""
        found: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(found, self._first)
        refused = [f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None]
        if refused:
            raise CheckpointError(f"{what}: cannot be written ({'; '.join(refused)})")

    def _keep(self, error: Exception) -> None:
        text = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
        self._first = self._first or text
