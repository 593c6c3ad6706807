"""A forked worker is like a new process: what it runs, how it ends, and what ends it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from rlhf.actors import fork_server, forked_worker
from rlhf.actors.forked_worker import FOLDER, NUMBER, server_name

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(sys.platform != "linux", reason="it uses descriptors of processes, which Linux alone has"),
]

SERVER = f"""
import sys
sys.path.insert(0, {str(Path(fork_server.__file__).parent)!r})  # alone, as the program that it is
import fork_server
fork_server.MODULES = ("decimal", "no_such_module")
sys.path.pop(0)
fork_server.main()
"""
CLIENT = str(Path(forked_worker.__file__))
SHOW = """
import json, os, signal, sys
names = sorted(name for name in globals() if name not in ("__builtins__", "__cached__", "__annotations__"))
here = {
    "names": names, "main": __name__, "file": __file__, "is_main": sys.modules["__main__"].__dict__ is globals(),
    "argv": sys.argv, "path": sys.path, "cwd": os.getcwd(), "environ": dict(os.environ), "input": sys.stdin.read(),
    "files": sorted(os.listdir("/proc/self/fd")),
    "handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGTERM)],
}
print(json.dumps(here))
print("to the error output", file=sys.stderr)
"""


@dataclass
class Node:
    """A node's raylet, which only sleeps, and its fork server."""

    folder: Path
    environ: dict[str, str]
    raylet: "subprocess.Popen[bytes]"
    servers: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    @property
    def socket(self) -> Path:
        return self.folder / "sockets" / server_name(self.environ)

    def start_server(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", SERVER, str(self.socket), str(self.raylet.pid)]
        self.servers.append(subprocess.Popen(command, env=self.environ))
        return self.servers[-1]

    def client(
        self,
        program: str,
        *arguments: str,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> "subprocess.Popen[str]":
        """What Ray starts in place of `python program ARGUMENTS`."""
        file = self.folder / "program.py"
        file.write_text(program)
        named = f"--raylet-name={self.folder}/sockets/raylet"
        command = [sys.executable, "-I", CLIENT, str(file), named, *arguments]
        return subprocess.Popen(
            command, env=self.environ, cwd=self.folder, text=True, stdin=stdin, stdout=stdout, stderr=stderr
        )


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    (tmp_path / "sockets").mkdir()
    (tmp_path / "logs").mkdir()
    environ = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME") if name in os.environ}
    environ["LC_ALL"] = "C.UTF-8"  # Python would add a variable where there is no locale
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, (environ.get("PYTHONPATH"), str(Path.cwd()))))
    node = Node(tmp_path, environ, subprocess.Popen(["sleep", "600"]))
    node.start_server()
    until(node.socket.exists)
    yield node
    for process in (node.raylet, *node.servers):
        process.kill()
        process.wait()


def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_forked_program_sees_what_a_new_process_sees(node: Node) -> None:
    node.environ["RAY_JOB_ID"] = "a word of the client's own"
    client = node.client(SHOW, "an argument", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    given, told = client.communicate("some input")
    command = [sys.executable, *client.args[3:]]  # type: ignore[index]
    fresh = subprocess.run(
        command, env=node.environ, cwd=node.folder, input="some input", capture_output=True, text=True, check=True
    )
    assert (client.returncode, told) == (0, fresh.stderr)
    assert json.loads(given) == json.loads(fresh.stdout)


def test_it_has_the_libraries_and_random_numbers_of_its_own(node: Node) -> None:
    program = "import random, sys; print('decimal' in sys.modules, 'argparse' in sys.modules, random.random())"
    outputs = [node.client(program, stdout=subprocess.PIPE).communicate()[0].split() for _ in range(2)]
    assert [output[:2] for output in outputs] == [["True", "False"]] * 2
    assert outputs[0][2] != outputs[1][2]


def test_an_environment_that_no_packet_holds_arrives_whole(node: Node) -> None:
    node.environ |= {f"RAY_LONG_{number}": "x" * 100_000 for number in range(10)}
    program = "import os; print(sum(map(len, os.environ.values())) > 1_000_000, 'decimal' in __import__('sys').modules)"
    for _ in range(5):
        client = node.client(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert client.communicate() == ("True True\n", "")


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("sys.exit(3)", 3),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("os.abort()", -signal.SIGABRT),
        ("raise SystemExit", 0),
        ("os.kill(os.getpid(), 15)", -signal.SIGTERM),
    ],
)
def test_its_end_is_the_client_s(node: Node, end: str, status: int) -> None:
    assert node.client(f"import os, sys; {end}").wait() == status


def test_an_error_is_printed_and_ends_it(node: Node) -> None:
    client = node.client("1 / 0", stderr=subprocess.PIPE)
    assert client.communicate()[1].endswith("ZeroDivisionError: division by zero\n")
    assert client.returncode == 1


def started(client: "subprocess.Popen[str]") -> psutil.Process:
    assert client.stdout is not None
    return psutil.Process(int(client.stdout.readline()))


SLEEPER = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def test_a_worker_ends_with_its_client_alone(node: Node) -> None:
    first, second = (node.client(SLEEPER, stdout=subprocess.PIPE) for _ in range(2))
    killed, other = started(first), started(second)
    first.kill()
    first.communicate()
    until(lambda: not killed.is_running())
    assert other.is_running()
    os.killpg(other.pid, signal.SIGKILL)  # as Ray does: it takes nothing else along
    second.communicate()
    assert second.returncode == -signal.SIGKILL
    assert node.client("raise SystemExit(4)").wait() == 4, "others are forked as before"


def test_the_server_ends_with_the_raylet(node: Node) -> None:
    client = node.client(SLEEPER, stdout=subprocess.PIPE)
    worker = started(client)
    node.raylet.kill()
    assert node.servers[0].wait(20) == 0
    assert client.wait(20) == 1
    assert not node.socket.exists()
    worker.kill()  # a worker of Ray ends when its raylet does
    client.communicate()


def test_of_two_servers_one_serves(node: Node) -> None:
    assert node.start_server().wait(20) == 0
    assert node.servers[0].poll() is None
    assert node.client("raise SystemExit(5)").wait() == 5


def test_where_there_is_no_server_one_is_started(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one was killed, whose socket is left."""
    node.servers[0].kill()
    node.servers[0].wait()
    monkeypatch.setattr(forked_worker, "SERVER", node.folder / "server.py")
    forked_worker.SERVER.write_text(SERVER)
    log = node.folder / "logs" / "server.log"
    before = set(psutil.Process().children())
    connection = forked_worker.connect(node.socket, log)
    connection.close()
    (server,) = set(psutil.Process().children()) - before
    assert server.cmdline()[-1] == str(os.getppid())
    server.kill()
    server.wait()
    assert log.exists()


def test_where_none_can_be_had_the_client_becomes_the_worker(node: Node) -> None:
    file = node.folder / "alone.py"
    file.write_text("import sys; print(sys.argv[1:], sys.flags.isolated)")
    command = [sys.executable, "-I", CLIENT, str(file), "an argument"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "['an argument'] 0\n"
    assert done.stderr == "a worker starts without the fork server: Ray did not tell the raylet's socket\n"


def test_a_server_that_ends_while_it_imports_is_done_without(node: Node) -> None:
    node.servers[0].send_signal(signal.SIGSTOP)  # it does not accept
    client = node.client("print('done')", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: len(psutil.Process(client.pid).net_connections("unix")) == 1)
    node.servers[0].kill()
    output, told = client.communicate()
    assert (client.returncode, output) == (0, "done\n")
    assert told.startswith("a worker starts without the fork server: ")


def test_workers_of_one_environment_share_a_server() -> None:
    mine = {"PATH": "/bin", "OMP_NUM_THREADS": "2"}
    assert server_name(mine) == server_name({**mine, "RAY_JOB_ID": "0100"})
    assert server_name(mine) == server_name({**mine, "PWD": "/elsewhere", "OLDPWD": "/", FOLDER: "/servers"})
    assert server_name(mine) != server_name({**mine, "OMP_NUM_THREADS": "1"})


def test_a_request_that_makes_no_sense_is_dropped_and_its_files_are_closed(node: Node) -> None:
    assert node.client("raise SystemExit(6)").wait() == 6, "it serves"
    server = psutil.Process(node.servers[0].pid)
    before = server.num_fds()
    for text in (b"{", b"{}", b"[]", b"[]" * 200_000):
        with socket.socket(socket.AF_UNIX) as connection, open(os.devnull, "rb") as nothing:  # noqa: PTH123
            connection.connect(str(node.socket))
            socket.send_fds(connection, [NUMBER.pack(len(text))], [nothing.fileno()] * 3)
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(text)
            connection.settimeout(20)
            assert connection.recv(1) == b""
    assert server.num_fds() == before
    assert node.client("raise SystemExit(6)").wait() == 6


def test_requests_of_others_are_refused(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(ValueError, match="another user"):
            fork_server.receive(ours)
