"""How long a run is: known before it starts, because learning-rate schedules need it."""

from dataclasses import dataclass
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
    """Most passes over the examples of a step; the algorithm may stop earlier."""
    critic_warmup_steps: int = 0
    """First steps in which the policy does not learn."""

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps in one step of the loop."""
        return ceil(self.examples_per_step / self.batch_size) * self.num_epochs

    def num_updates(self, role: Role) -> int:
        """Optimizer steps that `role` will make at most: fewer where the algorithm stops the passes early."""
        warmup_steps = self.critic_warmup_steps if role is Role.POLICY else 0
        return max(self.num_steps - warmup_steps, 0) * self.updates_per_step

    def learns(self, role: Role, step: int) -> bool:
        """Whether `role` makes optimizer steps in step `step` of the loop (1 is the first)."""
        return role is not Role.POLICY or step > self.critic_warmup_steps
