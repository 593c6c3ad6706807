"""The files of a worker: its output, and a trace of its calls."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def redirect_output(file: Path) -> None:
    """Append everything that this process, its libraries and its children print and log to `file`. On a node without
    the run's folder, the output goes to Ray's logs."""
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
    """One JSON line for each call of a worker: {"call", "start", "end"}, in seconds since the epoch."""

    def __init__(self, file: Path | None) -> None:
        """Nothing is recorded without a file, or on a node without its folder."""
        self._file = file if file is not None and file.parent.is_dir() else None

    @contextmanager
    def span(self, call: str) -> Iterator[None]:
        """Record the start and end of `call`."""
        start = time.time()
        try:
            yield
        finally:
            if self._file is not None:
                # On a full disk the record is lost, but the call succeeds.
                with suppress(OSError), self._file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps({"call": call, "start": start, "end": time.time()}) + "\n")
