"""What Ray runs in place of Python for a worker on a CPU: it asks this node's fork server for the process.

A program of the standard library alone, which starts in 20 ms. It lives as long as the worker, whose process id Ray
learns when the worker registers; it ends as the worker ended, and where it is killed the worker is. Where no server can
be had, it becomes the worker itself.
"""

import hashlib
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

NUMBER = struct.Struct("!i")
CONNECT_TIMEOUT_S = 20.0
START_TIMEOUT_S = 120.0
"""Longest wait for a process: the first one waits for the imports."""
POLL_S = 0.02
SERVER = Path(__file__).with_name("fork_server.py")
FOLDER = "RLHF_FORK_SERVERS"
"""The variable that names the folder of servers that run already."""
OF_RAY = ("RAY_", "SPT_")
"""What begins variables of Ray, some of which are of one worker or job. The server does not import Ray."""
OF_A_PROCESS = {FOLDER, "PWD", "OLDPWD", "SHLVL", "_"}
"""Variables that say where and by what a process was started, which no library asks when it is imported. A process that
was started in another folder than its parent's has a wrong PWD, which the shell that starts Ray's workers corrects."""


def main() -> None:
    arguments = sys.argv[1:]
    try:
        connection = request(arguments, os.environ)
    except OSError as error:
        sys.stderr.write(f"a worker starts without the fork server: {error}\n")
        os.execv(sys.executable, [sys.executable, *arguments])
    end_as(wait_status(connection))


def request(arguments: Sequence[str], environ: Mapping[str, str]) -> socket.socket:
    """Ask for a process that runs a Python program. Returns the connection on which its exit status will come.

    Raises OSError where no process came in time, and none will.
    """
    name, folder = server_name(environ), raylet_socket(arguments).parent
    log = folder.with_name("logs") / f"{name}.log"
    paths = [Path(ready, name) for ready in (environ.get(FOLDER),) if ready]
    connection = connect(next((path for path in paths if path.is_socket()), folder / name), log)
    ask(connection, arguments, environ, (0, 1, 2))
    return connection


def ask(
    connection: socket.socket, arguments: Sequence[str], environ: Mapping[str, str], files: tuple[int, int, int]
) -> None:
    """Ask a server for a process with `files` as its standard input, output and error. Raises OSError where none came
    in time."""
    connection.settimeout(START_TIMEOUT_S)
    content = json.dumps({"arguments": list(arguments), "cwd": str(Path.cwd()), "environ": dict(environ)}).encode()
    socket.send_fds(connection, [NUMBER.pack(len(content))], list(files))
    connection.sendall(content)
    if len(connection.recv(NUMBER.size, socket.MSG_WAITALL)) < NUMBER.size:
        raise ConnectionError("it has ended")


def raylet_socket(arguments: Sequence[str]) -> Path:
    """The raylet's socket, which Ray tells every worker."""
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--raylet-name":
            return Path(value)
    raise OSError("Ray did not tell the raylet's socket")


def server_name(environ: Mapping[str, str]) -> str:
    """The name of the server for workers with these variables: libraries read them when they are imported."""
    shared = sorted(
        (name, value) for name, value in environ.items() if not name.startswith(OF_RAY) and name not in OF_A_PROCESS
    )
    return "fork-" + hashlib.sha256(repr((sys.executable, shared)).encode()).hexdigest()[:8]


def connect(path: Path, log: Path) -> socket.socket:
    """Connect to the server at `path`; where there is none, start it."""
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    is_started = False
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(path))
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() > deadline:
                raise
        if not is_started:
            start_server(path, log, parent=os.getppid(), environ=os.environ)  # Ray's raylet has started this process
            is_started = True
        time.sleep(POLL_S)


def start_server(path: Path, log: Path, *, parent: int, environ: Mapping[str, str]) -> int:
    """Start a server that ends with the process `parent`. Of several that are started at the same time one stays.
    Returns its process id."""
    return os.posix_spawn(
        sys.executable,
        [sys.executable, str(SERVER), str(path), str(parent)],
        environ,
        setsid=True,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
    )


def wait_status(connection: socket.socket, timeout_s: float | None = None) -> int:
    """Wait for the end of the worker. Returns its exit status, or the negative number of its signal. Raises
    TimeoutError."""
    connection.settimeout(timeout_s)
    status = connection.recv(NUMBER.size, socket.MSG_WAITALL)
    return int(NUMBER.unpack(status)[0]) if len(status) == NUMBER.size else 1


def end_as(status: int) -> None:
    """End with an exit status, or by the signal whose negative number it is."""
    if status < 0:
        number = signal.Signals(-status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    sys.exit(abs(status))


if __name__ == "__main__":
    main()
