"""The peak memory of the workers, to compare with the planned memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from rlhf.actors.groups import WorkerGroup
from rlhf.planning.hardware import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryGauge:
    """Reads the peak memory of all workers for the metrics of a step."""

    groups: Mapping[str, WorkerGroup]
    """Workers by their roles, e.g. `policy+critic`."""
    timeout_s: float

    def __call__(self) -> dict[str, float]:
        """The highest peak in each group, in GiB; nothing of rollout engines that are all lost and not replaced yet.
        Raises: as `RemoteCalls.run`."""
        metrics = {}
        for name, group in self.groups.items():
            peaks = group.run(
                lambda _rank, handle: handle.peak_memory.remote(), phase="reading of memory", timeout_s=self.timeout_s
            )
            if peaks:
                metrics[f"memory/{name}"] = max(cast(list[int], peaks)) / GIB
        return metrics
