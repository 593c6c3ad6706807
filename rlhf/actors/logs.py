"""What an actor leaves behind: a file with everything it printed, and a trace of when it was busy with what."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def redirect_output(file: Path) -> None:
    """Send everything that this process prints and logs, its libraries' and children's output too, to the end of
    `file`. On a node that does not see the run's folder, the output stays in Ray's own logs."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


class Trace:
    """One JSON line for each call that an actor worked on: {"call", "start", "end"}, in seconds since the epoch."""

    def __init__(self, file: Path | None) -> None:
        """Without a file, or on a node that does not see its folder, nothing is recorded."""
        self._file = file if file is not None and file.parent.is_dir() else None

    @contextmanager
    def span(self, call: str) -> Iterator[None]:
        """Record that the actor is busy with `call`."""
        start = time.time()
        try:
            yield
        finally:
            if self._file is not None:
                # A full disk costs the record, not the call.
                with suppress(OSError), self._file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps({"call": call, "start": start, "end": time.time()}) + "\n")
