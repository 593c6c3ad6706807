"""What is wrong with a data set, gathered so that a user sees all of it at once."""

import logging
from collections import Counter

from rlhf.errors import DataError

logger = logging.getLogger(__name__)

SHOWN_PER_FILE = 20
SHOWN = 20
"""Most lines of one error: more would hide how many rows are wrong."""


class RowError(ValueError):
    """One row is wrong. Says what; the reader knows where."""


class Problems:
    """Gathers bad rows (up to `max_bad_rows` are forgiven: named in the log and counted), problems of the whole data
    set (never forgiven), and notes of what is left out though nothing is wrong."""

    def __init__(self, max_bad_rows: int) -> None:
        self.max_bad_rows = max_bad_rows
        self.num_bad_rows = 0
        self.reasons: dict[str, tuple[int, str]] = {}
        """What was wrong with rows: how often, and where first."""
        self.notes: list[str] = []
        """What is not read, one line each."""
        self._lines: dict[str, list[str]] = {}
        self._per_file: Counter[str] = Counter()
        self._fatal: list[str] = []

    def add_row(self, file: str, where: str, what: str) -> None:
        """Note that the row at `where` in `file` is wrong."""
        self.num_bad_rows += 1
        self._per_file[file] += 1
        count, first = self.reasons.get(what, (0, where))
        self.reasons[what] = count + 1, first
        if self._per_file[file] <= SHOWN_PER_FILE:
            self._lines.setdefault(file, []).append(f"{where}: {what}")

    def add(self, what: str) -> None:
        """Note that the data set as a whole is wrong."""
        self._fatal.append(what)

    def note(self, what: str) -> None:
        """Say once that something is not read."""
        if what not in self.notes:
            self.notes.append(what)

    def settle(self) -> None:
        """Raise DataError with everything found, or log the bad rows that are forgiven."""
        if self._fatal or self.num_bad_rows > self.max_bad_rows:
            raise DataError([*self._rows(SHOWN - len(self._fatal)), *self._fatal])
        for line in self._rows(SHOWN_PER_FILE * len(self._lines)):
            logger.warning("row dropped: %s", line)

    def _rows(self, room: int) -> list[str]:
        """The bad rows of each file, in about `room` lines for all files: the last line of a file that has more of
        them says how many."""
        each = max(2, room // max(1, len(self._lines)))
        found = []
        for file, lines in self._lines.items():
            count = self._per_file[file]
            shown = lines if count <= each else lines[: each - 1]
            found += [*shown, f"{file}: {count - len(shown)} more rows are wrong."] if count > len(shown) else shown
        return found
