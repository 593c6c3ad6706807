"""Connecting to Ray: joining a cluster that is there, or starting one of this machine alone."""

import ipaddress
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import ray
from ray._private import ray_constants
from ray._private.authentication.authentication_utils import is_token_auth_enabled

from rlhf.actors.calls import first_line
from rlhf.actors.orphans import OrphanWatch
from rlhf.errors import ConfigError, StallError

LOCAL = "local"
AUTO = "auto"
"""For Ray: the cluster that runs on this machine."""
LOOPBACK = "127.0.0.1"
LOOPBACK_ALONE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
LOCAL_ENVIRONMENT = {
    # When the driver is killed the control store dies with it, and nobody needs to wait for its return.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "RAY_gcs_server_request_timeout_seconds": "10",
    # A busy laptop may need longer than Ray's 30 s to start.
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Without a dashboard nobody sees the last 100,000 calls, which the control store would keep.
    "RAY_task_events_report_interval_ms": "0",
    # Of the logs of all processes that ever lived, so many are held open.
    "RAY_LOG_MONITOR_MAX_OPEN_FILES": "64",
}
VERSION = re.compile(r"(?:Ray|Python): (\S+)")
CONTROL_STORE_WAIT = "RAY_gcs_server_port_wait_time_s"
START_ATTEMPTS = 2
JOIN_ATTEMPTS = 3
JOIN_TIMEOUT_S = 10.0


def connect(address: str, namespace: str, *, allow_unauthenticated: bool = False) -> OrphanWatch:
    """Connect this process to the cluster at `address`. Returns a watch over the processes that this started.

    Raises:
        ConfigError: this process is connected to a cluster already; there is no cluster to join, or one that strangers
            could use, unless `allow_unauthenticated`.
        StallError: none of this machine could be started.
    """
    if ray.is_initialized():
        raise ConfigError("ray: this process is connected to a cluster already. Call ray.shutdown() first.")
    if address == LOCAL:
        return start(namespace)
    join(address, namespace)
    if not allow_unauthenticated:
        try:
            require_token((node["NodeManagerAddress"] for node in ray.nodes()), has_token=is_token_auth_enabled())
        except ConfigError:
            ray.shutdown()
            raise
    return OrphanWatch()


def start(namespace: str) -> OrphanWatch:
    """Start a cluster. For some of its steps Ray allows 30 s and no more, hence a second attempt."""
    for name, value in LOCAL_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ[CONTROL_STORE_WAIT] = "120"
    failure = ""
    for _ in range(START_ATTEMPTS):
        orphans = OrphanWatch()
        try:
            with orphans, loopback_alone():
                ray.init(
                    address=LOCAL,
                    namespace=namespace,
                    include_dashboard=False,
                    logging_level="error",
                    log_to_driver=False,
                    _node_ip_address=LOOPBACK,
                )
            return orphans
        except Exception as error:
            # The boundary to Ray, which raises bare exceptions here too.
            failure = first_line(error)
            orphans.close()
    raise StallError(f"ray: no cluster of this machine could be started (tried {START_ATTEMPTS} times): {failure}")


@contextmanager
def loopback_alone() -> Iterator[None]:
    """Let a cluster that starts inside listen on this machine only.

    On Linux Ray puts the address that leads to the world in the place of 127.0.0.1, unless it is told that clusters of
    several machines are not wanted. Its variable, which the started processes read, is read here at import only.
    """
    before = os.environ.get(LOOPBACK_ALONE)
    constant = ray_constants.ENABLE_RAY_CLUSTER
    os.environ[LOOPBACK_ALONE] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = constant
        os.environ.pop(LOOPBACK_ALONE)
        if before is not None:
            os.environ[LOOPBACK_ALONE] = before


def require_token(addresses: Iterable[str], *, has_token: bool) -> None:
    """Refuse a cluster, by its nodes' addresses, that takes jobs from whoever reaches it. Raises ConfigError."""
    beyond = sorted({address for address in addresses if not is_loopback(address)})
    if beyond and not has_token:
        raise ConfigError(
            f"ray: the cluster has nodes beyond loopback ({', '.join(beyond[:3])}) and no token authentication: "
            "whoever reaches them may run code on all of them. Turn tokens on (SECURITY.md), or set "
            "cluster.allow_unauthenticated where nobody else reaches their network."
        )


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by name or number."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def join(address: str, namespace: str) -> None:
    """Join a cluster. Ray itself would try for a quarter of an hour, so that somebody listens there is tried first."""
    advice = "Start one with `ray start --head`, or leave cluster.address out for one of this machine alone."
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    is_place = port.isdigit() and bool(host) and "//" not in address
    if address != AUTO and not is_place:
        raise ConfigError(
            f"cluster.address or RAY_ADDRESS: need HOST:PORT as `ray start --head` prints it, or auto (got {address}). "
            "To submit a job: `ray job submit --address http://HOST:8265 -- rlhf train ...`."
        )
    if is_place and not answers(host, int(port)):
        tried = f"tried {JOIN_ATTEMPTS} times in {JOIN_TIMEOUT_S:g} s"
        raise ConfigError(f"ray: no cluster at {address} ({tried}). {advice}")
    os.environ[CONTROL_STORE_WAIT] = "1"  # one attempt, which Ray lets take 40 s: somebody else may listen there
    try:
        ray.init(address=address, namespace=namespace, logging_level="error", log_to_driver=False)
    except Exception as error:
        # The boundary to Ray, which raises bare exceptions here too.
        if versions := differing_versions(str(error)):
            raise ConfigError(f"ray: {versions}") from error
        raise ConfigError(f"ray: no cluster at {address}: {first_line(error).rstrip('.')}. {advice}") from error


def differing_versions(text: str) -> str | None:
    """What Ray says about versions that differ, in a line; None where it says something else."""
    found = VERSION.findall(text)
    if "Version mismatch" not in text or len(found) != 4:
        return None
    cluster, driver = (f"Ray {found[n]} on Python {found[n + 1]}" for n in (0, 2))
    return f"the cluster at that address has {cluster}, this process {driver}; use the same on both."


def answers(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    pause_s = JOIN_TIMEOUT_S / JOIN_ATTEMPTS
    for _ in range(JOIN_ATTEMPTS):
        start = time.monotonic()
        try:
            socket.create_connection((host, port), timeout=pause_s).close()
            return True
        except OSError:
            time.sleep(max(0.0, start + pause_s - time.monotonic()))
    return False
