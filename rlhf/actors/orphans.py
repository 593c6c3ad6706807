"""Ends the processes of a local cluster that would outlive a killed driver.

The kernel ends most of them with the driver. Ray's agents are not its children: they notice, and then try for a minute
to tell a control store that is gone. Run as a script, this waits for the driver in a process of its own.
"""

import contextlib
import subprocess
import sys

import psutil

CLOSE_TIMEOUT_S = 10.0


class OrphanWatch:
    """Watches over every process that this one starts inside the `with` block, from its end until `close`."""

    def __init__(self) -> None:
        self._before: set[psutil.Process] = set()
        self._watcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> None:
        self._before = descendants()

    def __exit__(self, *_: object) -> None:
        pids = [str(process.pid) for process in descendants() - self._before]
        if not pids:  # the cluster is somebody else's
            return
        # A session of its own: the terminal's Ctrl-C is for the driver.
        self._watcher = subprocess.Popen(
            [sys.executable, "-P", __file__, *pids],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def close(self) -> None:
        """End what is still there."""
        if self._watcher is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._watcher.communicate(timeout=CLOSE_TIMEOUT_S)


def descendants() -> set[psutil.Process]:
    """Children, their children, and so on."""
    return set(psutil.Process().children(recursive=True))


def main() -> None:
    """End the processes named on the command line once nobody can write to our input any more: the driver alone could,
    and the kernel lets go for it however it ends."""
    watched = []
    for pid in sys.argv[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):
            watched.append(psutil.Process(int(pid)))
    sys.stdin.read()
    for process in watched:
        # psutil knows a process by its start too, and never kills another one that took the same number.
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    main()
