"""What the loop sees of a data set."""

from typing import Protocol, TypeVar

T = TypeVar("T")


class Rows(Protocol[T]):
    """Rows in a seeded order that never ends and can be continued from a position."""

    position: int

    def take(self, count: int) -> list[T]:
        """The next `count` rows."""
        ...

    def take_batch(self, batch_size: int) -> list[T]:
        """The next batch of the epoch: at most `batch_size` rows, never those of two epochs."""
        ...
