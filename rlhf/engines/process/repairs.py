"""Repairs that a process makes by itself, until the run records them."""

import logging
import threading
from collections import Counter

from rlhf.repair import Repair

logger = logging.getLogger(__name__)


def log_repair(repair: Repair) -> None:
    """Write a repair to the process's log."""
    logger.warning("%s: %s", repair.kind, repair.text)


class RepairLog:
    """The repairs of a worker that the driver has not taken yet. Equal ones are counted. Thread-safe."""

    def __init__(self) -> None:
        self._found: Counter[Repair] = Counter()
        self._lock = threading.Lock()

    def add(self, repair: Repair) -> None:
        log_repair(repair)
        with self._lock:
            self._found[repair] += 1

    def take(self) -> list[Repair]:
        """The repairs since the last call, in the order in which they were first made."""
        with self._lock:
            found, self._found = self._found, Counter()
        return [Repair(kind=one.kind, where=one.where, text=one.text, count=count) for one, count in found.items()]
