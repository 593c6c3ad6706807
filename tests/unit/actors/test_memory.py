"""The memory of workers, as a step reports it."""

from collections.abc import Sequence
from typing import cast

from rlhf.actors.groups import WorkerGroup
from rlhf.actors.memory import MemoryGauge


class Peaks:
    """A group whose workers have these peaks, in bytes."""

    def __init__(self, *peaks: int) -> None:
        self._peaks = peaks

    def run(self, submit: object, *, phase: str, timeout_s: float) -> Sequence[int]:
        return self._peaks


def test_the_highest_peak_of_each_group_and_nothing_of_engines_that_are_being_replaced() -> None:
    groups = {"policy": Peaks(2**30, 3 * 2**30), "rollout": Peaks()}
    gauge = MemoryGauge(groups={name: cast(WorkerGroup, group) for name, group in groups.items()}, timeout_s=1.0)
    assert gauge() == {"memory/policy": 3.0}
