"""Connecting to Ray: joining a running cluster, or starting one on this machine."""

import ipaddress
import logging
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

import ray
from ray._private import ray_constants
from ray._private import utils as ray_utils
from ray._private import worker as ray_worker
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from rlhf.actors.calls import first_line
from rlhf.actors.orphans import OrphanWatch
from rlhf.engines.process.repairs import log_repair
from rlhf.errors import ConfigError, PreemptedError, StallError
from rlhf.repair import Repair, Repaired, RepairKind

logger = logging.getLogger(__name__)

LOCAL = "local"
AUTO = "auto"
"""Ray's name for the cluster that runs on this machine."""
LOOPBACK = "127.0.0.1"
MULTI_NODE_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
LOCAL_ENVIRONMENT = {
    # When the driver is killed, so is the control store: nothing should wait for it to come back.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_gcs_server_request_timeout_seconds": "10",
    # A busy laptop may need longer than Ray's 30 s to start.
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_USAGE_STATS_ENABLED": "0",
    # The control store would keep the last 100,000 calls for the dashboard, which is not started.
    "RAY_task_events_report_interval_ms": "0",
    # Ray would start a process for each core before it lets the driver in. Workers have environments of their own, so
    # only those of reward functions could use them.
    "RAY_prestart_worker_first_driver": "0",
    # The most worker logs that are kept open at a time, of all workers since the start.
    "RAY_LOG_MONITOR_MAX_OPEN_FILES": "64",
}
VERSION = re.compile(r"(?:Ray|Python): (\S+)")
CONTROL_STORE_WAIT = "RAY_gcs_server_port_wait_time_s"
WORKER_DIED = "A worker died or was killed while executing a task"
START_ATTEMPTS = 2
JOIN_ATTEMPTS = 3
JOIN_TIMEOUT_S = 10.0
END_TIMEOUT_S = 10.0


def connect(
    address: str, namespace: str, *, allow_unauthenticated: bool = False, repaired: Repaired = log_repair
) -> OrphanWatch:
    """Connect this process to the cluster at `address`, or start one. Returns the watch over the started processes.
    `repaired` is told of a start that had to be repeated.

    Raises:
        ConfigError: this process is connected to a cluster already; there is no cluster at `address`; or the cluster
            has no authentication and `allow_unauthenticated` is not set.
        StallError: no cluster could be started on this machine.
    """
    if ray.is_initialized():
        raise ConfigError("ray: this process is connected to a cluster already. Call ray.shutdown() first.")
    ray_worker.print_to_stdstream = log_message
    if address == LOCAL:
        return start(namespace, repaired)
    join(address, namespace)
    if not allow_unauthenticated:
        try:
            require_token((node["NodeManagerAddress"] for node in ray.nodes()), has_token=is_token_auth_enabled())
        except ConfigError:
            ray.shutdown()
            raise
    return OrphanWatch()


def start(namespace: str, repaired: Repaired) -> OrphanWatch:
    """Start a cluster on this machine. Tries twice: some steps have a fixed timeout of 30 s in Ray."""
    for name, value in LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ[CONTROL_STORE_WAIT] = "120"
    failure = ""
    for _ in range(START_ATTEMPTS):
        orphans = OrphanWatch()
        try:
            with orphans, loopback_only(), own_signal_handlers():
                ray.init(
                    address=LOCAL,
                    namespace=namespace,
                    include_dashboard=False,
                    logging_level="error",
                    log_to_driver=False,
                    _node_ip_address=LOOPBACK,
                )
            if failure:
                text = f"ray: did not start ({failure}); it was started once more"
                repaired(Repair(kind=RepairKind.START, where="ray", text=text))
            return orphans
        except BaseException as error:
            orphans.close()
            if not isinstance(error, Exception) or is_interruption(error):
                raise
            failure = first_line(error)  # Ray also raises plain Exceptions
    raise StallError(f"ray: no cluster could be started on this machine (tried {START_ATTEMPTS} times): {failure}")


def local_cpus() -> float:
    """The CPUs that Ray gives a cluster of this machine."""
    return float(ray_utils.get_num_cpus())


def disconnect(orphans: OrphanWatch) -> None:
    """Disconnect this process from its cluster, and end the cluster if this process started it.

    Waits for the processes of such a cluster. Ray waits a second for each, which is too short on a busy machine: the
    process would stay a zombie of this one, and Python warns about those.
    """
    node = ray_worker._global_node
    kinds = node.all_processes.values() if node is not None else ()
    processes = [started.process for kind in kinds for started in kind]
    ray.shutdown()
    orphans.close()
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_TIMEOUT_S)


@contextmanager
def own_signal_handlers() -> Iterator[None]:
    """Inside, this process keeps its handler of SIGTERM. Ray would replace it at the start of its initialization by
    one that ends the process with exit code 15, without a word."""
    before = ray_utils.set_sigterm_handler
    ray_utils.set_sigterm_handler = _keep_handler
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = before


def log_message(message: Mapping[str, object], ignore_prefix: bool) -> None:
    """In place of Ray's printing to stdout: the first sentence of a message of its node processes. What follows is
    advice for tasks, and up to a hundred lines of logs. Workers that died are told by who waits for them."""
    del ignore_prefix
    lines = message["lines"]
    assert isinstance(lines, list), "texts"
    for text in map(str, lines):
        if WORKER_DIED not in text:
            logger.warning("ray: %s.", text.strip().partition("\n")[0].partition(". ")[0].rstrip("."))


def is_interruption(error: BaseException | None) -> bool:
    """Whether a signal's handler raised `error`, or what it follows from: Ray makes a SystemError of it."""
    while error is not None and not isinstance(error, PreemptedError):
        error = error.__cause__ or error.__context__
    return error is not None


def _keep_handler(_: object) -> None:
    """Set no handler."""


@contextmanager
def loopback_only() -> Iterator[None]:
    """A cluster that is started inside listens on loopback only.

    On Linux, Ray replaces 127.0.0.1 by the address of the external network unless multi-node clusters are disabled. The
    started processes read the environment variable; this process has read it at import, so the constant is set too.
    """
    before = os.environ.get(MULTI_NODE_VARIABLE)
    constant = ray_constants.ENABLE_RAY_CLUSTER
    os.environ[MULTI_NODE_VARIABLE] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        os.environ.pop(MULTI_NODE_VARIABLE)
        if before is not None:
            os.environ[MULTI_NODE_VARIABLE] = before


def require_token(addresses: Iterable[str], *, has_token: bool) -> None:
    """Raise ConfigError for a cluster that can be reached from other machines and accepts jobs without a token."""
    exposed = sorted({address for address in addresses if not is_loopback(address)})
    if exposed and not has_token:
        raise ConfigError(
            f"ray: the cluster has nodes beyond loopback ({', '.join(exposed[:3])}) and no token authentication: "
            "anyone who can reach them can run code on all of them. Enable tokens (SECURITY.md), or set "
            "cluster.allow_unauthenticated if no one else can reach their network."
        )


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's loopback."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def join(address: str, namespace: str) -> None:
    """Join a cluster. First checks that a server listens there, since Ray itself would retry for 15 minutes."""
    advice = "Start one with `ray start --head`, or leave out cluster.address to start one on this machine."
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    is_host_port = port.isdigit() and bool(host) and "//" not in address
    if address != AUTO and not is_host_port:
        raise ConfigError(
            f"cluster.address or RAY_ADDRESS: need HOST:PORT as `ray start --head` prints it, or auto (got {address}). "
            "To submit a job: `ray job submit --address http://HOST:8265 -- rlhf train ...`."
        )
    if is_host_port and not accepts_connections(host, int(port)):
        tried = f"tried {JOIN_ATTEMPTS} times in {JOIN_TIMEOUT_S:g} s"
        raise ConfigError(f"ray: no cluster at {address} ({tried}). {advice}")
    os.environ[CONTROL_STORE_WAIT] = "1"  # one attempt of up to 40 s: the server may not be Ray
    try:
        with own_signal_handlers():
            if is_host_port:
                GcsClient(address=address)  # unlike `ray.init`, it tells a missing token from a missing cluster
            ray.init(address=address, namespace=namespace, logging_level="error", log_to_driver=False)
    except AuthenticationError as error:
        raise ConfigError(f"ray: {token_problem(address, str(error), os.environ)}") from error
    except Exception as error:
        # Ray also raises plain Exceptions.
        if is_interruption(error):
            raise
        if versions := differing_versions(str(error)):
            raise ConfigError(f"ray: {versions}") from error
        raise ConfigError(f"ray: no cluster at {address}: {first_line(error).rstrip('.')}. {advice}") from error


def token_problem(address: str, text: str, environ: Mapping[str, str]) -> str:
    """Why a cluster with token authentication refused this process, from Ray's message, and what to do."""
    if environ.get("RAY_AUTH_MODE") != "token":
        why = "RAY_AUTH_MODE=token is not set here"
    elif "no authentication token was found" in text:
        why = "there is none here"
    else:
        why = "it rejects the one that is here"
    return (
        f"the cluster at {address} needs a token, and {why}. Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH or "
        "RAY_AUTH_TOKEN to the cluster's own token (`ray get-auth-token` on its head node)."
    )


def differing_versions(text: str) -> str | None:
    """A line about different versions, from Ray's error message; None for other messages."""
    found = VERSION.findall(text)
    if "Version mismatch" not in text or len(found) != 4:
        return None
    cluster, driver = (f"Ray {found[n]} on Python {found[n + 1]}" for n in (0, 2))
    return f"the cluster at that address has {cluster}, this process {driver}; use the same on both."


def accepts_connections(host: str, port: int) -> bool:
    """Whether a server accepts connections there, in up to three attempts."""
    pause_s = JOIN_TIMEOUT_S / JOIN_ATTEMPTS
    for _ in range(JOIN_ATTEMPTS):
        start = time.monotonic()
        try:
            socket.create_connection((host, port), timeout=pause_s).close()
            return True
        except OSError:
            time.sleep(max(0.0, start + pause_s - time.monotonic()))
    return False
