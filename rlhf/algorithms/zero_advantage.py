"""Warns where all advantages are 0 for many steps: the responses of each group got equal rewards."""

from collections.abc import Mapping

from rlhf.algorithms.advantages import Floats
from rlhf.algorithms.state import number
from rlhf.types import Json

PATIENCE_STEPS = 10
TEXT = (
    "for {steps} steps all advantages were 0: every response got the same reward as those it is compared with, and "
    "nothing is learned. Check in this order: the reward (rollouts/*.jsonl shows each response with its own); prompts "
    "that are all too hard or all too easy; rollout.temperature and rollout.group_size, where responses are alike"
)


class ZeroAdvantageWatch:
    """Says once when ten steps in a row had no advantage."""

    def __init__(self) -> None:
        self._steps = 0

    def observe(self, advantages: Floats) -> None:
        """The advantages of all tokens of one step."""
        if len(advantages) and self._steps <= PATIENCE_STEPS:
            self._steps = 0 if advantages.any() else self._steps + 1

    def warnings(self) -> tuple[str, ...]:
        """The warnings of this step."""
        if self._steps != PATIENCE_STEPS:
            return ()
        self._steps += 1  # warned
        return (TEXT.format(steps=PATIENCE_STEPS),)

    def state(self) -> dict[str, Json]:
        """What must survive a restart."""
        return {"equal_steps": self._steps}

    def restore(self, state: Mapping[str, Json]) -> None:
        """Continue from `state`."""
        self._steps = int(number({"equal_steps": 0, **state}, "equal_steps"))
