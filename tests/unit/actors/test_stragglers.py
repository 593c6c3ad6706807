"""Who is warned to be slow, and who is not."""

from collections.abc import Sequence

import pytest

from rlhf.actors.calls import Worker
from rlhf.actors.stragglers import MAX_TIMES_LATE, Stragglers

ENGINES = [
    Worker(handle=None, name=f"rollout engine {index}", node=f"10.0.0.{index}", node_id=f"n{index}", pid=100 + index)
    for index in range(4)
]
SLOW = (2.0, 2.2, 4.0, 1.9)
EVEN = (2.0, 2.2, 2.4, 1.9)


def warnings_after(*waits: Sequence[float], phase: str = "rollout generation") -> list[str]:
    """What is warned after waits of so many seconds for each engine."""
    warned: list[str] = []
    stragglers = Stragglers(warned.append)
    for seconds in waits:
        stragglers.wait_succeeded(phase, list(zip(ENGINES, seconds, strict=False)))
    return warned


def test_one_that_is_last_by_far_in_a_row_is_named_once() -> None:
    assert warnings_after(*[SLOW] * (MAX_TIMES_LATE - 1)) == []
    (text,) = warnings_after(*[SLOW] * (3 * MAX_TIMES_LATE))
    assert text == (
        "rollout engine 2 (node 10.0.0.2, pid 102) is a straggler: it was late 10 times in a row. "
        "The last rollout generation took it 4.0 s, and the others 2.0 s. Check its node"
    )


@pytest.mark.parametrize(
    "waits",
    [
        [EVEN] * 50,
        [(0.2, 0.2, 0.6, 0.2)] * 50,
        [(2.0,)] * 50,
        ([SLOW] * (MAX_TIMES_LATE - 1) + [EVEN]) * 5,
        [SLOW, SLOW[::-1]] * 50,
    ],
    ids=["even", "short", "alone", "now and then", "in turns"],
)
def test_nobody_is_named(waits: list[Sequence[float]]) -> None:
    assert warnings_after(*waits) == []


def test_of_two_the_slower_is_named() -> None:
    (text,) = warnings_after(*[(2.0, 3.2)] * MAX_TIMES_LATE)
    assert text.startswith("rollout engine 1 (")


def test_waits_for_other_things_are_counted_apart_and_versions_are_none() -> None:
    warned: list[str] = []
    stragglers = Stragglers(warned.append)
    for version in range(MAX_TIMES_LATE - 1):
        stragglers.wait_succeeded(f"weight sync of version {version}", list(zip(ENGINES, SLOW, strict=True)))
        stragglers.wait_succeeded("rollout generation", list(zip(ENGINES, EVEN, strict=True)))
    assert warned == []
    stragglers.wait_succeeded(f"weight sync of version {MAX_TIMES_LATE}", list(zip(ENGINES, SLOW, strict=True)))
    assert len(warned) == 1
    assert f"The last weight sync of version {MAX_TIMES_LATE} took it 4.0 s" in warned[0]
