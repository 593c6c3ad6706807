"""Rendezvous of a process group: a TCP store that listens on one address only, and gloo bound to its interface.

By default torch's store listens on every address of the machine, and gloo on the address of the host name.
"""

import ipaddress
import os
import socket
from datetime import timedelta

import psutil
from torch._C._distributed_c10d import TCPStore

from rlhf.errors import WorkerLostError


def open_listener(address: str, port: int = 0) -> socket.socket:
    """A socket that listens on `address` only; port 0 chooses a free port. Raises WorkerLostError if it cannot."""
    try:
        return socket.create_server((address, port), family=_family(address))
    except OSError as error:
        raise WorkerLostError(f"cannot listen on {address}:{port}: {error.strerror or error}") from error


def open_store(rank: int, address: str, port: int, timeout_s: float, listener: socket.socket | None = None) -> TCPStore:
    """The TCP store of a process group. Rank 0 serves it, on `listener` if one is open already; other ranks connect."""
    if rank:
        return join_store(address, port, timeout_s)
    return serve_store(listener or open_listener(address, port), timeout_s)


def serve_store(listener: socket.socket, timeout_s: float) -> TCPStore:
    """Serve a store on a listening socket, which it takes over. The store lives as long as the returned object."""
    address, port = listener.getsockname()[:2]
    return TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
        use_libuv=False,  # only the older server accepts a socket that is already bound
    )


def join_store(address: str, port: int, timeout_s: float) -> TCPStore:
    """Connect to the store that another process serves."""
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s), use_libuv=False)


def bind_collectives(address: str) -> None:
    """Make gloo use the network interface that has `address`, unless the user has set one. NCCL too, if that is the
    loopback interface, which NCCL would skip; between machines NCCL itself finds the fastest network."""
    name = interface_of(address)
    if name is None:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if ipaddress.ip_address(address).is_loopback:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The network interface with an address; every loopback address belongs to the interface with 127.0.0.1."""
    wanted = "127.0.0.1" if ipaddress.ip_address(address).is_loopback else address
    interfaces = psutil.net_if_addrs()
    return next((name for name, held in interfaces.items() if any(entry.address == wanted for entry in held)), None)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
