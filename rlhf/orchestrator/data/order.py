"""The order in which rows are visited: seeded, resumable, every row once an epoch."""

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

from rlhf.orchestrator.step.batching import next_batch_size
from rlhf.types import IntArray

T = TypeVar("T")


class Order(Generic[T]):
    """Visits rows epoch after epoch.

    The order of an epoch is a function of seed and epoch alone, so `position`, the number of rows taken so far, is
    all that a checkpoint must hold. No tail is dropped: `take` goes on into the next epoch, `take_batch` gives smaller
    batches at the end of one.
    """

    def __init__(self, rows: Sequence[T], *, seed: int, shuffle: bool = True) -> None:
        if not rows:
            raise ValueError("no rows to visit")
        self.position = 0
        self._rows = rows
        self._seed = seed
        self._shuffle = shuffle
        self._orders: dict[int, IntArray] = {}

    @property
    def epoch(self) -> int:
        """The epoch of the row that comes next, from 0."""
        return self.position // len(self._rows)

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self._rows)

    def take(self, count: int) -> list[T]:
        """The next `count` rows."""
        taken = [self._row(position) for position in range(self.position, self.position + count)]
        self.position += count
        return taken

    def take_batch(self, batch_size: int) -> list[T]:
        """The next batch of this epoch: `batch_size` rows, fewer in an epoch's last two batches."""
        return self.take(next_batch_size(len(self) - self.position % len(self), batch_size))

    def _row(self, position: int) -> T:
        epoch, index = divmod(position, len(self._rows))
        if epoch not in self._orders:
            self._orders = {epoch: self._epoch_order(epoch)}
        return self._rows[int(self._orders[epoch][index])]

    def _epoch_order(self, epoch: int) -> IntArray:
        if not self._shuffle:
            return np.arange(len(self._rows), dtype=np.int64)
        generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        return generator.permutation(len(self._rows)).astype(np.int64)
