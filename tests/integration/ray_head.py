"""A Ray cluster of a test's own, started as a user starts one: `ray start --head`."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.integration.command_line import clean_environment

START_TIMEOUT_S = 200.0
STOP_TIMEOUT_S = 60.0
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True, kw_only=True)
class RayHead:
    """A running head node. `environment` is that of a user who may use it: it holds where the token lies."""

    address: str
    dashboard: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    folder: Path

    def stop(self) -> None:
        """End the processes of this cluster and of no other one."""
        end_tree(self.process)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def joined_nodes(
    head: RayHead, addresses: Sequence[str], num_cpus: int
) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """More nodes of this machine in the cluster, each with an address of its own. Gives the process of each."""
    nodes, logs = {}, {}
    with contextlib.ExitStack() as stack:
        for address in addresses:
            # A folder of its own, as on a machine of its own: nodes that share one clear away each other's jobs.
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="rlhf-ray-", dir="/tmp", ignore_cleanup_errors=True)
            )
            logs[address] = Path(folder, "node.log")
            nodes[address] = _join(head, address, logs[address], num_cpus)
            stack.callback(end_tree, nodes[address])
        for address, node in nodes.items():
            wait_until_started(node, logs[address])
        yield nodes


def _join(head: RayHead, address: str, log: Path, num_cpus: int) -> subprocess.Popen[bytes]:
    command = (RAY, "start", "--address", head.address, "--block", "--node-ip-address", address)
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, "--temp-dir", str(log.parent), "--num-cpus", str(num_cpus)],
            env=head.environment,
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_until_started(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for the line with which `ray start` says that a node is up."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it started, and no other one."""
    if process.poll() is not None:
        return
    mine = psutil.Process(process.pid)
    started = mine.children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    for one in (mine, *started):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait(STOP_TIMEOUT_S)


def lose_node(process: subprocess.Popen[bytes]) -> None:
    """End a node and everything on it at once, as when its machine goes down."""
    mine = psutil.Process(process.pid)
    for one in (mine, *mine.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait(STOP_TIMEOUT_S)


def start_ray_head(num_cpus: int = 2, *, has_job_server: bool = False) -> RayHead:
    """Start a head node on the loopback address, with token authentication. The job server is a part of the dashboard.

    Its folder is a short path of its own: the paths of sockets may have 107 bytes.
    """
    folder = Path(tempfile.mkdtemp(prefix="rlhf-ray-", dir="/tmp"))
    environment = clean_environment() | {
        "HOME": str(folder),  # the token lies in ~/.ray
        # What vLLM finds out about a class of models takes it 8 s, once in the life of its cache.
        "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT", str(Path.home() / ".cache" / "vllm")),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",  # as in a cluster that a run starts
        "RAY_raylet_start_wait_time_s": "120",  # 30 s are too few where other work takes the cores
    }
    token = folder / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text(secrets.token_hex(32))
    port, dashboard_port, agent_port, client_port = free_ports(4)
    log = folder / "head.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(RAY, "start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", str(port)),
                *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard_port)),
                *("--include-dashboard", str(has_job_server)),
                # The port of the agent that takes jobs has a default, and where it is taken no job is.
                *("--dashboard-agent-listen-port", str(agent_port), "--ray-client-server-port", str(client_port)),
                *("--temp-dir", str(folder), "--num-cpus", str(num_cpus)),
            ],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    wait_until_started(process, log)
    deadline = time.monotonic() + START_TIMEOUT_S
    while has_job_server and not listens(dashboard_port):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    return RayHead(
        address=f"127.0.0.1:{port}",
        dashboard=f"http://127.0.0.1:{dashboard_port}",
        environment=environment,
        process=process,
        folder=folder,
    )


def listens(port: int) -> bool:
    """Whether somebody accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
