"""How long a run is: known before it starts, because learning-rate schedules need it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil

from rlhf.types import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLength:
    """Steps of the loop, and what each step holds at most."""

    num_steps: int
    examples_per_step: int
    batch_size: int
    """Examples in one optimizer step."""
    num_epochs: int = 1
    """Passes over the examples of a step."""
    frozen_steps: Mapping[Role, int] = field(default_factory=dict)

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps in one step of the loop."""
        return ceil(self.examples_per_step / self.batch_size) * self.num_epochs

    def num_updates(self, role: Role) -> int:
        """Optimizer steps that `role` will make. An early stop of the passes makes fewer, never more."""
        return max(self.num_steps - self.frozen_steps.get(role, 0), 0) * self.updates_per_step


def count_steps(num_steps: int | None, num_epochs: int, num_rows: int, rows_per_step: int) -> int:
    """Steps of the loop: as asked, else enough that every row of every epoch is used."""
    return num_steps if num_steps is not None else ceil(num_epochs * num_rows / rows_per_step)
