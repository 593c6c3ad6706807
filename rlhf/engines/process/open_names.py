"""Names of shared memory and sockets that a process keeps open.

A process that is killed leaves them in the file system, where nobody frees what they hold. Those who have opened them
need the names no more.
"""

import contextlib
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil

MAPS = Path("/proc/self/maps")
SHARED_MEMORY = Path("/dev/shm")
OF_PYTHON, OF_VLLM = "psm_", "vllm_dist_"
"""How the names of shared memory begin that Python and vLLM give. NCCL's are left alone: it may connect two processes
at their first exchange."""

_unlink = SharedMemory.unlink


def unlink_open_names(sockets: Path) -> None:
    """Remove the names of this process's shared memory, and of its sockets that lie in the folder `sockets`. What is
    open stays open, here and in others; nobody else can open it afterwards."""
    SharedMemory.unlink = _unlink_if_there  # type: ignore[assignment,method-assign]
    bound = {Path(str(one.laddr)) for one in psutil.Process().net_connections(kind="unix") if one.laddr}
    for path in {*_mapped_names(), *(path for path in bound if path.parent == sockets)}:
        with contextlib.suppress(FileNotFoundError):  # another process has been faster
            path.unlink()
            if path.name.startswith(OF_PYTHON):
                resource_tracker.unregister(f"/{path.name}", "shared_memory")


def _unlink_if_there(memory: SharedMemory) -> None:
    """In place of `SharedMemory.unlink`, which its owner calls in the end."""
    with contextlib.suppress(FileNotFoundError):
        _unlink(memory)


def _mapped_names() -> set[Path]:
    """Files of shared memory that this process has mapped, whichever process made them."""
    lines = MAPS.read_text().splitlines() if MAPS.exists() else []
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if f" {SHARED_MEMORY}/" in line}
    return {path for path in paths if path.name.startswith((OF_PYTHON, OF_VLLM))}
