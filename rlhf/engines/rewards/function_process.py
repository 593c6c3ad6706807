"""A child process that runs a user's function: it is started, called, and killed when it takes too long."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from pydantic import TypeAdapter

from rlhf.config.reward.arguments import Parameter
from rlhf.engines.process.child_process import ending, kill, log_lines
from rlhf.engines.process.repairs import log_repair
from rlhf.errors import ConfigError
from rlhf.repair import Repair, Repaired, RepairKind
from rlhf.types import Json

SCRIPT = Path(__file__).parents[1] / "process" / "user_code.py"
START_TIMEOUT_S = 120.0
MAX_REPLY_BYTES = 64 * 2**20
PARAMETERS = TypeAdapter(list[Parameter])


class ChildFailedError(Exception):
    """The child died or took too long. Says which; the next request starts a new child."""


class ChildOverranError(ChildFailedError):
    """The child was killed because it took too long."""


class FunctionProcess:
    """One child process that runs one function. Not thread-safe.

    `parameters` are those of the function. Raises ConfigError if it cannot be imported or is no function.
    """

    parameters: tuple[Parameter, ...]

    def __init__(
        self,
        function: str,
        *,
        memory_gib: float | None = None,
        network: bool = True,
        repaired: Repaired = log_repair,
    ) -> None:
        self._function = function
        self._network = network
        self._repaired = repaired
        self._memory_bytes = None if memory_gib is None else int(memory_gib * 2**30)
        self._process: subprocess.Popen[bytes] | None = None
        self._overran = threading.Event()
        self._start()

    def ask(self, request: Mapping[str, Json], timeout_s: float) -> dict[str, Json]:
        """Send a request and wait for its reply. Raises ChildFailedError."""
        if self._process is not None and self._process.poll() is not None:
            self.tell(f"its process {ending(self._process, {})} between two calls and was started again")
            self.close()
        if self._process is None:
            self._start()
        return self._exchange(request, timeout_s)

    def tell(self, text: str) -> None:
        """Tell of a repair."""
        where = f"reward {self._function}"
        self._repaired(Repair(kind=RepairKind.REWARD_PROCESS, where=where, text=f"{where}: {text}"))

    def close(self) -> None:
        """Kill the process and everything that it started."""
        if self._process is None:
            return
        if self._process.returncode is None:
            kill(self._process)
        self._process.wait()
        self._connection.close()
        self._socket.close()
        self._process = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        # -P: modules in the script's own folder must not shadow the standard library.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT), str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._socket = ours
        self._connection = Connection(os.dup(ours.fileno()))
        assert self._process.stdout is not None, "stdout is a pipe"
        threading.Thread(target=log_lines, args=(self._process.stdout, self._function), daemon=True).start()
        setup: dict[str, Json] = {
            "function": self._function,
            "path": [os.path.abspath(entry) for entry in sys.path],  # noqa: PTH100 an empty entry means this folder
            "memory_bytes": self._memory_bytes,
            "network": self._network,
        }
        try:
            hello = self._exchange(setup, START_TIMEOUT_S)
        except ChildFailedError as error:
            raise ConfigError(f"reward.function: importing {self._function} {error}.") from error
        if "wrong" in hello:
            self.close()
            raise ConfigError(f"reward.function: {hello['wrong']}.")
        self.parameters = tuple(PARAMETERS.validate_python(hello["parameters"]))

    def _exchange(self, message: Mapping[str, Json], timeout_s: float) -> dict[str, Json]:
        """Send a message and receive the reply.

        Consumes: a message. Produces: the reply. Waits for: the child. Unblocked by: the reply, the child's end, or the
        timer, which kills the child and shuts down the socket, so that neither sending nor receiving can hang.
        """
        assert self._process is not None, "started"
        self._overran.clear()
        timer = threading.Timer(timeout_s, self._overrun, [self._process])
        timer.daemon = True
        timer.start()
        try:
            self._connection.send_bytes(json.dumps(message).encode())
            reply: dict[str, Json] = json.loads(self._connection.recv_bytes(MAX_REPLY_BYTES))
        except (EOFError, OSError, ValueError) as error:
            ended = "" if self._overran.is_set() else ending(self._process, {})
            kill(self._process)
            self.close()
            if not ended:
                raise ChildOverranError(f"took over {timeout_s:g} s") from error
            raise ChildFailedError(ended) from error
        finally:
            timer.cancel()
        return reply

    def _overrun(self, process: "subprocess.Popen[bytes]") -> None:
        """Called by the timer, which may find that the process has been replaced."""
        self._overran.set()
        connected = self._socket
        kill(process)
        # The reply may have arrived at the same time, and the socket may be closed already.
        with contextlib.suppress(OSError):
            connected.shutdown(socket.SHUT_RDWR)
