"""How many repairs a run made, and which of them the user has been told."""

import threading

from rlhf.repair import Repair, RepairKind


class RepairCount:
    """Counts repairs between two steps, and knows which ones are new. Thread-safe."""

    def __init__(self) -> None:
        self._count = 0
        self._known: set[tuple[RepairKind, str]] = set()
        self._lock = threading.Lock()

    def add(self, repair: Repair) -> bool:
        """Count a repair. Returns whether it is the first of its kind at its place."""
        place = (repair.kind, repair.where)
        with self._lock:
            self._count += repair.count
            is_new = place not in self._known
            self._known.add(place)
        return is_new

    def take(self) -> int:
        """The number of repairs since the last call."""
        with self._lock:
            count, self._count = self._count, 0
        return count
