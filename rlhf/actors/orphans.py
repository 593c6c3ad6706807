"""Ends the processes of a local cluster that would outlive a killed driver.

The kernel ends most of them with the driver. Ray's agents are not children of the driver, and try for a minute to reach
a control store that is gone. Run as a program, this module waits for the end of the driver in a process of its own.
"""

import contextlib
import subprocess
import sys

import psutil

CLOSE_TIMEOUT_S = 10.0


class OrphanWatch:
    """Ends every process that this one starts inside the `with` block, at `close` or when the driver dies."""

    def __init__(self) -> None:
        self._before: set[psutil.Process] = set()
        self._watcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> None:
        self._before = descendants()

    def __exit__(self, *_: object) -> None:
        pids = [str(process.pid) for process in descendants() - self._before]
        if not pids:  # the cluster was started by someone else
            return
        # In a new session, so that Ctrl-C in the terminal reaches only the driver.
        self._watcher = subprocess.Popen(
            [sys.executable, "-P", __file__, *pids],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def close(self) -> None:
        """End the processes that still run."""
        if self._watcher is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._watcher.communicate(timeout=CLOSE_TIMEOUT_S)


def descendants() -> set[psutil.Process]:
    """Children, their children, and so on."""
    return set(psutil.Process().children(recursive=True))


def main() -> None:
    """End the processes given on the command line when standard input is closed: the driver has its other end, which
    the kernel closes in whatever way the driver ends."""
    watched = []
    for pid in sys.argv[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):
            watched.append(psutil.Process(int(pid)))
    sys.stdin.read()
    for process in watched:
        # psutil also compares start times, and does not kill another process that reuses the id.
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    main()
