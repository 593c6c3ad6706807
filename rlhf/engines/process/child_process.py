"""A child process that runs the user's code: its output, its end, and how it is ended with all that it started."""

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

MAX_LOGGED_CHARS = 2000
LOGGED_BYTES_A_SECOND = 2**16
KILL_TIMEOUT_S = 2.0


def kill(process: "subprocess.Popen[bytes]") -> None:
    """End the child with everything that it started, also what left its process group: the child does that itself on
    SIGTERM, and its groups are killed if it is late. Only right after its end: the id of an ended group is reused."""
    groups = [process.pid]
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        process.terminate()
        process.wait(KILL_TIMEOUT_S)
    if process.returncode is None:
        with contextlib.suppress(OSError):
            groups += map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def ending(process: "subprocess.Popen[bytes]", meanings: Mapping[int, str]) -> str:
    """How a process that closed its socket ended. `meanings` are those of its own exit codes."""
    try:
        code = process.wait(timeout=5.0)
    except subprocess.TimeoutExpired:
        return "closed its connection"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return meanings.get(code, f"exited with code {code}")


def log_lines(stream: IO[bytes], name: str) -> None:
    """Log what a process prints, so that it neither mixes with the run's own output nor blocks on a full pipe. What
    exceeds LOGGED_BYTES_A_SECOND is left out, and how much that was is logged."""
    start, room, left_out = time.monotonic(), LOGGED_BYTES_A_SECOND, 0
    with stream:
        while line := stream.readline(MAX_LOGGED_CHARS):
            if left_out and time.monotonic() - start >= 1.0:
                logger.info("%s: [%d bytes left out]", name, left_out)
                left_out = 0
            if time.monotonic() - start >= 1.0:
                start, room = time.monotonic(), LOGGED_BYTES_A_SECOND
            room -= len(line)
            if room >= 0:
                logger.info("%s: %s", name, line.decode(errors="replace").rstrip())
            else:
                left_out += len(line)
    if left_out:
        logger.info("%s: [%d bytes left out]", name, left_out)
