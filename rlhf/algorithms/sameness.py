"""Groups whose answers all got the same reward, step after step."""

from collections.abc import Mapping

from rlhf.algorithms.state import number
from rlhf.types import Json

PATIENCE_STEPS = 10
TEXT = (
    "for {steps} steps every answer to a prompt got the same reward as the others, so that all advantages are 0 and "
    "nothing is learned. Check in this order: the reward (rollouts/*.jsonl shows each answer with its own); prompts "
    "that are all too hard or all too easy; rollout.temperature and rollout.num_samples, where answers are alike"
)


class Sameness:
    """Says once when no group of ten steps in a row told its answers apart."""

    def __init__(self) -> None:
        self._steps = 0

    def hear(self, num_groups: int, share_equal: float) -> None:
        """The groups of several answers in one step, and the share of them whose rewards were equal."""
        if num_groups and self._steps <= PATIENCE_STEPS:
            self._steps = self._steps + 1 if share_equal == 1.0 else 0

    def warnings(self) -> tuple[str, ...]:
        """What there is to say now."""
        if self._steps != PATIENCE_STEPS:
            return ()
        self._steps += 1  # said
        return (TEXT.format(steps=PATIENCE_STEPS),)

    def state(self) -> dict[str, Json]:
        """What must survive a restart."""
        return {"equal_steps": self._steps}

    def restore(self, state: Mapping[str, Json]) -> None:
        """Continue from `state`."""
        self._steps = int(number({"equal_steps": 0, **state}, "equal_steps"))
