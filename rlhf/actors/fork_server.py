"""A process of a node that has imported the libraries of workers, and forks a worker for each request.

A worker with a model imports three thousand modules, which takes it six seconds of a core and 300 MB. Forked ones have
most of them at once, and share the memory. One server serves the workers of a node that have the same environment. It
ends with its parent: the raylet of the node, or the driver that has started the cluster.

A program. It imports nothing of this package, so that every worker sees the package as it is when it starts, and
nothing of Ray, which remembers the job in whose process it was imported.
"""

import builtins
import fcntl
import gc
import importlib
import json
import os
import random
import selectors
import signal
import socket
import struct
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

NUMBER = struct.Struct("!i")
PEER = struct.Struct("3i")
"""The process, the user and the group at the other end of a socket."""
REQUEST_TIMEOUT_S = 10.0
BACKLOG = 128
MODULES = (
    "torch._dynamo",
    "torch.distributed.tensor",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "deepspeed",
)
"""What workers import, besides Ray. Libraries load most of their modules only when something is asked for."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to run, and where."""

    arguments: list[str]
    cwd: str
    environ: Mapping[str, str]
    files: list[int]
    """Standard input, output and error."""
    client: int
    """The process that asks."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A forked process, a descriptor of it, and the connection to the process that asked for it."""

    pid: int
    pidfd: int
    connection: socket.socket


class ForkServer:
    """Forks workers until the parent ends."""

    def __init__(self, listener: socket.socket, parent: int) -> None:
        """`parent` is a descriptor of its process."""
        self._listener = listener
        self._parent = parent
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(parent, selectors.EVENT_READ)

    def serve(self) -> CodeType | None:
        """Serve until the parent ends. Also returns in every forked process: there, with the program to run."""
        while True:
            for key, _ in self._selector.select():
                if self._selector.get_map().get(key.fd) is not key:  # gone since another event
                    continue
                if key.fd == self._parent:
                    return None
                if key.fileobj is self._listener:
                    program = self._accept()
                    if program is not None:
                        return program
                elif key.fd == key.data.pidfd:
                    self._tell_end(key.data)
                else:
                    self._kill(key.data)

    def _accept(self) -> CodeType | None:
        """Fork a worker for the next request. Returns as `serve`."""
        connection, _ = self._listener.accept()
        try:
            request = receive(connection)
        except (OSError, ValueError):
            connection.close()
            return None
        pid = os.fork()
        if pid == 0:
            self._leave()
            connection.close()
            return become_worker(request)
        for file in request.files:
            os.close(file)
        worker = Worker(pid=pid, pidfd=os.pidfd_open(pid), connection=connection)
        self._selector.register(worker.pidfd, selectors.EVENT_READ, worker)
        self._selector.register(connection, selectors.EVENT_READ, worker)
        with suppress(OSError):
            connection.sendall(NUMBER.pack(pid))
        return None

    def _tell_end(self, worker: Worker) -> None:
        """Tell how a worker ended."""
        _, status = os.waitpid(worker.pid, 0)
        with suppress(OSError):
            worker.connection.sendall(NUMBER.pack(os.waitstatus_to_exitcode(status)))
        self._selector.unregister(worker.pidfd)
        with suppress(KeyError):
            self._selector.unregister(worker.connection)
        os.close(worker.pidfd)
        worker.connection.close()

    def _kill(self, worker: Worker) -> None:
        """Kill a worker whose client was killed."""
        self._selector.unregister(worker.connection)
        signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)

    def _leave(self) -> None:
        """In a forked process: close what belongs to the server."""
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
            else:
                os.close(key.fd)
        self._selector.close()


def receive(connection: socket.socket) -> Request:
    """Read a request. Raises OSError, and ValueError where it is none, or another user's; its files are closed then."""
    connection.settimeout(REQUEST_TIMEOUT_S)
    client, user, _ = PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
    if user != os.getuid():
        raise ValueError("of another user")
    head, files, _, _ = socket.recv_fds(connection, NUMBER.size, 3)
    try:
        if len(head) < NUMBER.size or len(files) != 3:
            raise ValueError("without a length, or three files")
        (length,) = NUMBER.unpack(head)
        # With a timeout, `recv` gives what is there, and not all of what is asked for.
        with connection.makefile("rb") as stream:
            content = json.loads(stream.read(length))
        return Request(**content, files=files, client=client)
    except (OSError, ValueError, TypeError) as error:
        for file in files:
            os.close(file)
        raise ValueError("not a request") from error


def become_worker(request: Request) -> CodeType:
    """Make this process like one in which Python has just started. Returns the program to run."""
    os.setpgrp()  # Ray kills the process group of a worker that it disconnects
    for number, file in enumerate(request.files):
        os.dup2(file, number)
        os.close(file)
    with suppress(OSError):  # Ray has set it for the client
        Path("/proc/self/oom_score_adj").write_text(Path(f"/proc/{request.client}/oom_score_adj").read_text())
    os.environ.clear()
    os.environ.update(request.environ)
    os.chdir(request.cwd)
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    path = Path(request.arguments[0])
    sys.argv[:] = request.arguments
    sys.path[0] = str(path.parent)
    return compile(path.read_bytes(), path, "exec")


def run(program: CodeType) -> None:
    """Run a program as the main module."""
    names = sys.modules["__main__"].__dict__
    main = {"__name__": "__main__", "__builtins__": builtins, "__file__": program.co_filename}
    names.clear()
    names.update(main, __doc__=None, __loader__=None, __package__=None, __spec__=None)
    exec(program, names)


def main() -> None:
    path, parent = Path(sys.argv[1]), os.pidfd_open(int(sys.argv[2]))
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another one serves
            return
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(BACKLOG)
        for name in MODULES:
            with suppress(ImportError):
                importlib.import_module(name)
        # Collections of garbage would write to memory that is shared.
        gc.collect()
        gc.freeze()
        program = ForkServer(listener, parent).serve()
        if program is None:
            path.unlink(missing_ok=True)
    if program is not None:
        run(program)


if __name__ == "__main__":
    main()
