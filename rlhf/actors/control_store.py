"""Notices that Ray's control store (GCS) is gone, before Ray ends this process for it.

Ray's C++ code ends a driver with exit code 1 and without a message once its control store has not answered for
`RAY_gcs_rpc_server_reconnect_timeout_s`. No exception is raised and nothing runs at exit, so the end of a run must be
recorded before.
"""

import socket
import threading
import time
from collections.abc import Callable

from rlhf.errors import WorkerLostError

POLL_S = 1.0
CONNECT_TIMEOUT_S = 2.0
LOCAL_TIMEOUT_S = 5.0
"""For a control store on this machine: half of what Ray is told to wait (`connection.LOCAL_ENVIRONMENT`)."""
JOINED_TIMEOUT_S = 45.0
"""For that of another cluster, where Ray waits a minute."""


class ControlStoreWatch:
    """Connects to the control store once a second, in a thread of its own, and calls `lost` when none of the attempts
    of `timeout_s` succeeded. The kernel accepts connections for a busy process, so that load is not taken for a loss.

    Consumes: nothing. Produces: one call of `lost`. Waits for: time. Unblocked by: `stop`.
    """

    def __init__(self, address: str, lost: Callable[[WorkerLostError], None], timeout_s: float) -> None:
        """`address` is HOST:PORT."""
        host, _, port = address.rpartition(":")
        self._place = (host.strip("[]"), int(port))
        self._lost = lost
        self._timeout_s = timeout_s
        self._stopped = threading.Event()
        self._silent_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="control-store-watch", daemon=True)
        self._thread.start()

    @property
    def is_answered(self) -> bool:
        """Whether the last attempt to connect succeeded."""
        return self._silent_since is None

    def stop(self) -> None:
        """Stop watching, unless the control store does not answer: then leaving it would end this process too."""
        if self.is_answered:
            self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(POLL_S):
            if self._answers():
                self._silent_since = None
                continue
            now = time.monotonic()
            self._silent_since = now if self._silent_since is None else self._silent_since
            if now - self._silent_since >= self._timeout_s:
                host, port = self._place
                self._lost(
                    WorkerLostError(
                        f"ray: the control store (gcs_server) at {host}:{port} has accepted no connection for "
                        f"{now - self._silent_since:.0f} s. Without it Ray ends every process of the run"
                    )
                )
                return

    def _answers(self) -> bool:
        try:
            socket.create_connection(self._place, timeout=CONNECT_TIMEOUT_S).close()
        except OSError:
            return False
        return True
