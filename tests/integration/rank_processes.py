"""Ranks in processes that are forked from one that has imported their libraries: those imports take each process six
seconds of a core."""

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from rlhf.actors.forked_worker import CONNECT_TIMEOUT_S, POLL_S, ask, start_server, wait_status

ROOT = Path(__file__).parents[2]
VARIABLES = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


class RankProcesses:
    """Starts programs of this folder; their server ends with this process."""

    def __init__(self, folder: Path) -> None:
        self._environment = {**os.environ, **VARIABLES}
        self._socket = folder / "socket"
        start_server(self._socket, folder / "log", parent=os.getpid(), environ=self._environment)

    def run(self, program: str, ranks: Sequence[Sequence[object]], *, folder: Path, timeout_s: float = 280.0) -> None:
        """Run `python PROGRAM.py ARGUMENTS` once for each item of `ranks`, which has the arguments, all side by side.
        They log to `folder`. AssertionError where one fails, TimeoutError where one takes too long."""
        deadline = time.monotonic() + timeout_s
        logs = [folder / f"log_{number}" for number in range(len(ranks))]
        with contextlib.ExitStack() as stack:
            connections = []
            for arguments, log in zip(ranks, logs, strict=True):
                connections.append(stack.enter_context(self._connect()))  # a process is killed when this is closed
                with log.open("wb") as output, open(os.devnull, "rb") as nothing:  # noqa: PTH123
                    files = (nothing.fileno(), output.fileno(), output.fileno())
                    command = [str(Path(__file__).with_name(f"{program}.py")), *map(str, arguments)]
                    ask(connections[-1], command, self._environment, files)
            statuses = [wait_status(connection, max(0.1, deadline - time.monotonic())) for connection in connections]
        assert statuses == [0] * len(ranks), "\n".join(log.read_text()[-4000:] for log in logs)

    def _connect(self) -> socket.socket:
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self._socket))
                return connection
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                if time.monotonic() > deadline:
                    raise
            time.sleep(POLL_S)
