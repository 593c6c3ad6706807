"""How much memory a run's processes have held at most: what a plan is compared with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from rlhf.actors.groups import WorkerGroup
from rlhf.planning.hardware import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryGauge:
    """Reads the peaks of all processes, for the figures of a step."""

    groups: Mapping[str, WorkerGroup]
    """Processes by the name of what they host."""
    timeout_s: float

    def __call__(self) -> dict[str, float]:
        """The fullest process of each group, in GiB. Raises: as `wait_all`."""
        figures = {}
        for name, group in self.groups.items():
            peaks = group.run(
                lambda _rank, handle: handle.peak_memory.remote(), phase="reading of memory", timeout_s=self.timeout_s
            )
            figures[f"memory/{name}"] = max(cast(list[int], peaks)) / GIB
        return figures
