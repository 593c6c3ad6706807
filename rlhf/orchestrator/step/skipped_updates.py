"""Updates that were skipped because a gradient was not finite: how many a run survives."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Protocol

from rlhf.errors import NumericsError
from rlhf.types import Json, Role, StepReport

MAX_SKIPPED_IN_A_ROW = 3
MAX_SKIPPED_RECENTLY = 10
RECENT_UPDATES = 1000


class Note(Protocol):
    """Records an event for the user."""

    def __call__(self, kind: str, text: str, **more: Json) -> None:
        """`text` is shown; `more` is only in events.jsonl."""
        ...


class SkippedUpdates:
    """The newest updates of each role, over all launches of a run."""

    def __init__(self, roles: Iterable[Role], note: Note) -> None:
        self._recent: dict[Role, deque[bool]] = {role: deque(maxlen=RECENT_UPDATES) for role in roles}
        """Of each role, its newest updates in order: True where it was skipped."""
        self._note = note

    def state(self) -> dict[str, str]:
        """Of each role, its newest updates in order, one character each: s where it was skipped."""
        return {
            str(role): "".join("s" if skipped else "." for skipped in recent) for role, recent in self._recent.items()
        }

    def restore(self, state: Mapping[str, str]) -> None:
        """Count the updates of an earlier launch too."""
        for role, recent in self._recent.items():
            recent.extend(update == "s" for update in state.get(str(role), ""))

    def count(self, role: Role, step: int, ids: Sequence[str], report: StepReport) -> bool:
        """Whether the step was skipped. Raises NumericsError after too many in a row, or among the recent ones."""
        recent = self._recent[role]
        recent.append(not report.finite)
        if report.finite:
            return False
        in_a_row = sum(1 for _ in takewhile(bool, reversed(recent)))
        self._note("skipped_update", f"{role}: gradient not finite at step {step}; experiences {', '.join(ids)}")
        if in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise NumericsError(
                f"{role}: {in_a_row} updates in a row had a gradient that was not finite (last at "
                f"step {step}). Weights are those before them. Lower {role}.lr, or look at the experiences named in "
                "events.jsonl"
            )
        if sum(recent) > MAX_SKIPPED_RECENTLY:
            raise NumericsError(
                f"{role}: {sum(recent)} of the last {len(recent)} updates had a gradient that "
                f"was not finite (last at step {step}). At most {MAX_SKIPPED_RECENTLY} of {RECENT_UPDATES} may be. "
                f"Lower {role}.lr, or look at the experiences named in events.jsonl"
            )
        return True
