"""Where scored groups come from: read from a data set, or sampled and scored now (`rollout_source.py`)."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from rlhf.orchestrator.step.rows import Rows
from rlhf.types import ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupBatch:
    """The groups of one step. A checkpoint keeps where the data set goes on after them: at row `position`, without the
    later rows `ahead`, which are used already."""

    groups: tuple[ScoredGroup, ...]
    position: int
    ahead: tuple[int, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


class GroupSource(Protocol):
    """Gives the loop the groups of each step, in order."""

    def start(self, first_step: int, last_step: int, position: int, ahead: Collection[int] = ()) -> None:
        """Begin with `first_step`, reading rows from `position`, without those in `ahead`. The policy's weights must be
        live."""
        ...

    def take(self, step: int) -> GroupBatch:
        """Wait for the groups of `step`."""
        ...

    def release(self) -> None:
        """The weights that were trained on the last taken groups are live: others may be sampled in their place."""
        ...

    def close(self) -> None: ...


class OfflineSource:
    """Groups from a data set of demonstrations or preferences: every row once an epoch. Nothing is waited for."""

    def __init__(self, rows: Rows[ScoredGroup], batch_size: int, keep: Callable[[ScoredGroup], bool]) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._keep = keep

    def start(self, first_step: int, last_step: int, position: int, ahead: Collection[int] = ()) -> None:
        self._rows.position = position

    def take(self, step: int) -> GroupBatch:
        rows = self._rows.take_batch(self._batch_size)
        groups = tuple(group for group in rows if self._keep(group))
        metrics = {"data/groups_dropped": float(len(rows) - len(groups))}
        return GroupBatch(groups=groups, position=self._rows.position, metrics=metrics)

    def release(self) -> None:
        """Rows of a data set do not age."""

    def close(self) -> None:
        """There is nothing to close."""
