"""What the loop sees of a data set."""

from typing import Protocol, TypeVar

T = TypeVar("T")


class Rows(Protocol[T]):
    """Rows in a seeded order that never ends and can be continued from a position."""

    position: int

    def take(self, count: int) -> list[T]: ...
