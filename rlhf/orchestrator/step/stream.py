"""Which groups are asked for, and which of them a step learns from: the rules of a stream of groups, without time.

Asynchronous (off-policy) training is bounded here: how many groups may be on their way, and how old they may be.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Collection
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice
from typing import Literal

from rlhf.errors import RlhfError

GroupOrder = Literal["fifo", "ready"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLimits:
    """How many groups are under way, and how old they may become."""

    batch_size: int
    """Groups that a step learns from."""
    max_lag: int = 0
    """Greatest age of a group in versions of the policy, when it is learned from."""
    order: GroupOrder = "fifo"
    """fifo: a step learns from the groups that were asked for first. ready: from those that are complete first."""
    extra: int = 0
    """Groups beyond `batch_size` that a step asks for. The last to complete are given up once it has enough."""
    max_rounds: int = 10
    """Groups that are sampled for a step, as a multiple of `batch_size`, where the algorithm drops some."""
    finish_partial: bool = True
    """Whether groups that are under way when new weights arrive are finished with these, or asked for again."""
    counts_newest: bool = False
    """Whether a response is as old as its newest tokens, since the others are not learned from. What is under way then
    does not become too old."""

    @property
    def capacity(self) -> int:
        """Most groups on their way from being asked for until the weights that learned from them are live."""
        return (self.max_lag + 1) * self.batch_size + self.extra


@dataclass(slots=True)
class _Group:
    row: int
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A group to sample. `row` is its prompt's place in the data; `step` the one that it is expected to be part of,
    which its seeds depend on."""

    number: int
    row: int
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The groups of one step, by their numbers, in the order of their rows. A checkpoint keeps where the
    data goes on: at row `position`, and without the rows `ahead`, which are used already."""

    step: int
    numbers: tuple[int, ...]
    position: int
    ahead: tuple[int, ...]


class GroupStream:
    """The state of every group between being asked for and being learned from. A value in one thread: no waiting, no
    clock, so that all schedules can be tested.

    ask -> under way -> complete(kept) -> form_batch -> release (the weights that learned from the batch are live)
                     -> complete(dropped): another is asked for in its place
                     -> expired: too old for any step to come, so its row is asked for again

    A group is asked for only while `StreamLimits.capacity` is not reached and the live weights are young enough for
    the next step. So with max_lag 0 sampling and training alternate, and a group in fifo order is never too old:

        max_lag 1, batch_size 1      live version   under way or waiting   learned from, and its lag
        ask 0 and 1                  0              0, 1
        batch of step 1: group 0     0              1                      0 (lag 0)
        release: version 1, ask 2    1              1, 2
        batch of step 2: group 1     1              2                      1 (lag 1)
    """

    def __init__(
        self, limits: StreamLimits, *, first_step: int, last_step: int, position: int = 0, ahead: Collection[int] = ()
    ) -> None:
        """Rows are read from `position`, without those in `ahead`. The live weights are those of `first_step` - 1."""
        self.limits = limits
        self.version = first_step - 1
        """The version of the live weights."""
        self._last_step = last_step
        self._next_step = first_step
        self._next_row = position
        self._used = set(ahead)
        """Rows from `_position` on that were learned from, or dropped."""
        self._position = position
        self._returned: list[int] = []
        """Rows to ask for again, in order."""
        self._numbers = 0
        self._under_way: dict[int, _Group] = {}
        self._first_rows: list[tuple[int, int]] = []
        """A heap of (row, number) of what is under way, and of what was."""
        self._waiting: dict[int, _Group] = {}
        """In the order in which they were complete."""
        self._waiting_rows: list[tuple[int, int]] = []
        """(row, number) of what is waiting, in order."""
        self._looked_at = (-1, -1)
        """Next step and live version when expired groups were last looked for."""
        self._formed: list[int] = []
        """Sizes of the batches that are not released."""
        self._dropped = 0
        """Groups dropped since the last batch."""

    @property
    def under_way(self) -> int:
        """Groups that are being sampled or scored."""
        return len(self._under_way)

    @property
    def waiting(self) -> int:
        """Complete groups that no batch has yet."""
        return len(self._waiting)

    @property
    def may_ask(self) -> int:
        """How many groups may be asked for now."""
        limits = self.limits
        if len(self._formed) > limits.max_lag:
            return 0  # sampled by the live weights they would be too old
        open_groups = self.under_way + self.waiting
        room = limits.capacity - open_groups - sum(self._formed)
        steps_left = self._last_step + 1 - self._next_step
        wanted = steps_left * limits.batch_size + (limits.extra if steps_left else 0) - open_groups
        return max(0, min(room, wanted, self._budget))

    @property
    def is_exhausted(self) -> bool:
        """Whether nothing is under way or waiting, and so many groups were dropped that no more may be asked for."""
        return not self.under_way and not self.waiting and not self._budget

    @property
    def _budget(self) -> int:
        """How many groups may be asked for until a batch is formed. Without a limit as long as none was dropped."""
        limits = self.limits
        if not self._dropped:
            return limits.capacity
        return max(0, limits.max_rounds * limits.batch_size - self._dropped - self.under_way - self.waiting)

    def ask(self) -> list[Asked]:
        """The groups to ask for now."""
        asked = []
        for _ in range(self.may_ask):
            step = self._next_step + (self.under_way + self.waiting) // self.limits.batch_size
            row = self._take_row()
            self._under_way[self._numbers] = _Group(row, self.version)
            heappush(self._first_rows, (row, self._numbers))
            asked.append(Asked(number=self._numbers, row=row, step=step))
            self._numbers += 1
        return asked

    def complete(self, number: int, *, keep: bool, version: int) -> bool:
        """A group is sampled, by weights of `version` and newer ones, and scored. False: it has expired meanwhile, and
        nobody wants it. Raises RlhfError if `version` was not live any more when the group was asked for."""
        if (group := self._under_way.pop(number, None)) is None:
            return False
        if version < group.version:
            raise RlhfError(
                f"rollout: a group was sampled from weights of version {version}, when version {group.version} was live"
            )
        if keep:
            group.version = version
            if version < self._oldest:
                self._looked_at = (-1, -1)
            self._waiting[number] = group
            insort(self._waiting_rows, (group.row, number))
        else:
            self._dropped += 1
            self._used.add(group.row)
        return True

    def form_batch(self) -> Batch | None:
        """The next step's groups, if they are complete: fewer than `batch_size` only where too many were dropped. Call
        `expire` before."""
        size = self.limits.batch_size
        if not self._waiting or (self.waiting < size and (self.under_way or self._budget)):
            return None
        if self.limits.order == "fifo":
            chosen = self._waiting_rows[:size]
            if self._first_row_under_way() < chosen[-1][0]:
                return None
        else:
            chosen = sorted((self._waiting[number].row, number) for number in islice(self._waiting, size))
        numbers = [number for _, number in chosen]
        for number in numbers:
            self._used.add(self._stop_waiting(number).row)
        while self._position in self._used:
            self._used.remove(self._position)
            self._position += 1
        self._formed.append(len(numbers))
        self._dropped = 0
        self._next_step += 1
        return Batch(
            step=self._next_step - 1, numbers=tuple(numbers), position=self._position, ahead=tuple(sorted(self._used))
        )

    def release(self) -> None:
        """The weights that learned from the oldest batch are live."""
        self._formed.pop(0)
        self.version += 1

    def expire(self) -> list[int]:
        """The groups that no step can learn from any more, by their numbers; their rows are asked for again. Where
        groups are not finished with newer weights, these are all that are under way and were asked for before."""
        if self._looked_at == (self._next_step, self.version):
            return []  # groups grow old with steps and versions alone
        self._looked_at = self._next_step, self.version
        late = {n for n, group in self._waiting.items() if group.version < self._oldest}
        if not self.limits.counts_newest:
            late |= {n for n, group in self._under_way.items() if group.version < self._oldest}
        if not self.limits.finish_partial:
            late |= {n for n, group in self._under_way.items() if group.version < self.version}
        rows = [(self._under_way.pop(n, None) or self._stop_waiting(n)).row for n in late]
        self._returned = sorted([*self._returned, *rows])
        return sorted(late)

    @property
    def _oldest(self) -> int:
        """The oldest version that the next step may learn from."""
        return self._next_step - 1 - self.limits.max_lag

    def _stop_waiting(self, number: int) -> _Group:
        group = self._waiting.pop(number)
        del self._waiting_rows[bisect_left(self._waiting_rows, (group.row, number))]
        return group

    def _first_row_under_way(self) -> float:
        while self._first_rows and self._first_rows[0][1] not in self._under_way:
            heappop(self._first_rows)
        return self._first_rows[0][0] if self._first_rows else math.inf

    def _take_row(self) -> int:
        if self._returned:
            return self._returned.pop(0)
        while self._next_row in self._used:
            self._next_row += 1
        self._next_row += 1
        return self._next_row - 1
