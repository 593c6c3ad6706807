"""What the loop sees of a data set."""

from typing import Protocol, TypeVar

T_co = TypeVar("T_co", covariant=True)


class Rows(Protocol[T_co]):
    """Rows in a seeded order that never ends and can be continued from a position."""

    position: int

    def take(self, count: int) -> list[T_co]: ...
