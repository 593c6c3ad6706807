"""A child process that runs the user's code: its output, its end, and how it is ended with all that it started."""

import contextlib
import logging
import os
import signal
import subprocess
from typing import IO

logger = logging.getLogger(__name__)

MAX_LOGGED_CHARS = 2000
KILL_TIMEOUT_S = 2.0


def kill(process: "subprocess.Popen[bytes]") -> None:
    """End the child with everything that it started, also what left its process group: the child does that itself on
    SIGTERM, and its group is killed if it is late. Only right after its end: the id of an ended group is reused."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        process.terminate()
        process.wait(KILL_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def ending(process: "subprocess.Popen[bytes]") -> str:
    """How a process that closed its socket ended."""
    try:
        code = process.wait(timeout=5.0)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def log_lines(stream: IO[bytes], name: str) -> None:
    """Log what a process prints, so that it neither mixes with the run's own output nor blocks on a full pipe."""
    with stream:
        while line := stream.readline(MAX_LOGGED_CHARS):
            logger.info("%s: %s", name, line.decode(errors="replace").rstrip())
