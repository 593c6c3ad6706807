"""The most memory that a process takes of its own, without the files that it maps."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
EVERY_S = 0.02


def own_bytes() -> int:
    """Anonymous memory of this process: what maps files is page cache, which the system takes back."""
    found = re.search(r"^RssAnon:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@dataclass(slots=True)
class Measured:
    """One phase: its seconds, and by how many bytes the process grew at most."""

    seconds: float = 0.0
    grown: int = 0

    def as_json(self) -> dict[str, float]:
        return {"seconds": self.seconds, "grown": self.grown}


@contextmanager
def measured() -> Iterator[Measured]:
    """Measure a block. What it gives is complete when the block ends."""
    result, ended, before, start = Measured(), threading.Event(), own_bytes(), time.monotonic()

    def watch() -> None:
        while not ended.wait(EVERY_S):
            result.grown = max(result.grown, own_bytes() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield result
    finally:
        ended.set()
        thread.join()
        result.grown = max(result.grown, own_bytes() - before)
        result.seconds = time.monotonic() - start
