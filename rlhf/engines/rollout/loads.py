"""Which of several engines gets a request."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True)
class Load:
    """What one engine was asked for, and has not completed."""

    requests: int = 0
    tokens: int = 0
    """The most that the requests may take."""

    def add(self, tokens: int) -> None:
        self.requests += 1
        self.tokens += tokens

    def remove(self, tokens: int) -> None:
        self.requests -= 1
        self.tokens -= tokens


def least_loaded(loads: Sequence[Load], count: int, slots: int | None) -> int | None:
    """The engine with the fewest tokens outstanding of those that have room for `count` more requests; None if none
    has. An engine takes `slots` requests (None: any number), or one larger group if it has nothing else."""
    free = [
        index
        for index, load in enumerate(loads)
        if slots is None or not load.requests or load.requests + count <= slots
    ]
    return min(free, key=lambda index: loads[index].tokens, default=None)
