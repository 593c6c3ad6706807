"""Says how far a long job is, every few seconds."""

import logging
import time

logger = logging.getLogger(__name__)

EVERY_S = 5.0


class Progress:
    """Logs `<what>: <done> of <total> <unit>` at most every EVERY_S seconds; a short job says nothing."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what = what
        self._total = total
        self._unit = unit
        self._said = time.monotonic()

    def reach(self, done: int) -> None:
        """Note that `done` of `total` is done."""
        now = time.monotonic()
        if now - self._said >= EVERY_S:
            self._said = now
            logger.info("%s: %d of %d %s", self._what, done, self._total, self._unit)
