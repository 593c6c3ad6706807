"""Who is told to be slow, and who is not."""

from collections.abc import Sequence

import pytest

from rlhf.actors.calls import Worker
from rlhf.actors.stragglers import TIMES, Stragglers

ENGINES = [
    Worker(handle=None, name=f"rollout engine {index}", node=f"10.0.0.{index}", node_id=f"n{index}", pid=100 + index)
    for index in range(4)
]
SLOW = (2.0, 2.2, 4.0, 1.9)
EVEN = (2.0, 2.2, 2.4, 1.9)


def told_after(*waits: Sequence[float], phase: str = "rollout generation") -> list[str]:
    """What is told after waits of so many seconds for each engine."""
    told: list[str] = []
    stragglers = Stragglers(told.append)
    for seconds in waits:
        stragglers.see(phase, list(zip(ENGINES, seconds, strict=False)))
    return told


def test_one_that_is_last_by_far_in_a_row_is_named_once() -> None:
    assert told_after(*[SLOW] * (TIMES - 1)) == []
    (text,) = told_after(*[SLOW] * (3 * TIMES))
    assert text == (
        "rollout engine 2 (node 10.0.0.2, pid 102) keeps the others waiting: 10 times in a row it was the last by far. "
        "This time rollout generation took it 4.0 s, and the others 2.0 s. Look at its node"
    )


@pytest.mark.parametrize(
    "waits",
    [
        [EVEN] * 50,
        [(0.2, 0.2, 0.6, 0.2)] * 50,
        [(2.0,)] * 50,
        ([SLOW] * (TIMES - 1) + [EVEN]) * 5,
        [SLOW, SLOW[::-1]] * 50,
    ],
    ids=["even", "short", "alone", "now and then", "in turns"],
)
def test_nobody_is_named(waits: list[Sequence[float]]) -> None:
    assert told_after(*waits) == []


def test_of_two_the_slower_is_named() -> None:
    (text,) = told_after(*[(2.0, 3.2)] * TIMES)
    assert text.startswith("rollout engine 1 (")


def test_waits_for_other_things_are_counted_apart_and_versions_are_none() -> None:
    told: list[str] = []
    stragglers = Stragglers(told.append)
    for version in range(TIMES - 1):
        stragglers.see(f"weight sync of version {version}", list(zip(ENGINES, SLOW, strict=True)))
        stragglers.see("rollout generation", list(zip(ENGINES, EVEN, strict=True)))
    assert told == []
    stragglers.see(f"weight sync of version {TIMES}", list(zip(ENGINES, SLOW, strict=True)))
    assert len(told) == 1
    assert f"This time weight sync of version {TIMES} took it 4.0 s" in told[0]
