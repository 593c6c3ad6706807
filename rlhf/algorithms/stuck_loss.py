"""A preference loss that does not leave the value it starts from."""

import math
from collections.abc import Mapping

from rlhf.algorithms.state import number
from rlhf.types import Json

STARTS_AT_LN_2 = frozenset({"dpo", "cdpo", "rdpo", "ln-dpo"})
PATIENCE_STEPS = 50
WINDOW_STEPS = 10
TOLERANCE = 0.005
TEXT = (
    "the loss is still {loss:.4f} after {steps} steps, and ln 2 = 0.6931 is where it starts: the policy does not tell "
    "chosen from rejected. Check in this order: that updates are applied and large enough (updates/applied, "
    "policy/grad_norm, policy.lr); labels that contradict each other; ties (pairs/tied); the same responses on both "
    "sides; algo.loss.beta last"
)


class StuckLossWatch:
    """Warns once when a loss that starts at ln 2 (policy and reference are equal) is still there after fifty steps:
    within 0.005, in the mean of the last ten."""

    def __init__(self, *, watches: bool) -> None:
        self._watches = watches
        self._steps = 0
        self._sum = 0.0

    def observe(self, loss: float | None) -> None:
        """The loss of one step."""
        if loss is not None and self._steps <= PATIENCE_STEPS:
            self._steps += 1
            self._sum += loss if self._steps > PATIENCE_STEPS - WINDOW_STEPS else 0.0

    def warnings(self) -> tuple[str, ...]:
        """The warnings of this step."""
        if not self._watches or self._steps != PATIENCE_STEPS:
            return ()
        self._steps += 1  # warned, or the loss moved: not checked again
        loss = self._sum / WINDOW_STEPS
        return (TEXT.format(loss=loss, steps=PATIENCE_STEPS),) if abs(loss - math.log(2)) < TOLERANCE else ()

    def state(self) -> dict[str, Json]:
        """What must survive a restart."""
        return {"standstill_steps": self._steps, "standstill_sum": self._sum}

    def restore(self, state: Mapping[str, Json]) -> None:
        """Continue from `state`."""
        self._steps = int(number(state, "standstill_steps"))
        self._sum = number(state, "standstill_sum")
