"""Where processes meet: a store on one address and no other, and gloo's connections on the interface of that address.

By themselves torch's store listens on every address of the machine, and gloo on that of its host name.
"""

import ipaddress
import os
import socket
from datetime import timedelta

import psutil
from torch._C._distributed_c10d import TCPStore

from rlhf.errors import WorkerLostError


def open_listener(address: str, port: int = 0) -> socket.socket:
    """A socket that listens on `address` alone; port 0 takes a free one. Raises WorkerLostError where it cannot."""
    try:
        return socket.create_server((address, port), family=_family(address))
    except OSError as error:
        raise WorkerLostError(f"cannot listen on {address}:{port}: {error.strerror or error}") from error


def meet(rank: int, address: str, port: int, timeout_s: float, listener: socket.socket | None = None) -> TCPStore:
    """The store of a group, which its first rank serves, at a `listener` that it has opened already where it has."""
    if rank:
        return join_store(address, port, timeout_s)
    return serve_store(listener or open_listener(address, port), timeout_s)


def serve_store(listener: socket.socket, timeout_s: float) -> TCPStore:
    """The store behind a listener, which is used up. It lives as long as this object."""
    address, port = listener.getsockname()[:2]
    return TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
        use_libuv=False,  # only the older server takes a socket that somebody else bound
    )


def join_store(address: str, port: int, timeout_s: float) -> TCPStore:
    """The store that another process serves."""
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_s), use_libuv=False)


def bind_collectives(address: str) -> None:
    """Let gloo use the interface that has `address`, unless the user has named one; NCCL too where that is loopback,
    which it would pass over. Between machines NCCL knows better which network is fast."""
    name = interface_of(address)
    if name is None:
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    if ipaddress.ip_address(address).is_loopback:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The network interface with an address; every loopback address is of the one with 127.0.0.1."""
    wanted = "127.0.0.1" if ipaddress.ip_address(address).is_loopback else address
    interfaces = psutil.net_if_addrs()
    return next((name for name, held in interfaces.items() if any(entry.address == wanted for entry in held)), None)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
