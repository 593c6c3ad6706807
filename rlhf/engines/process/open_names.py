"""File-system names of the shared memory and sockets that a process keeps open.

A killed process leaves these names behind, and the memory stays allocated. A process that has opened them no longer
needs the names, so they can be removed early.
"""

import contextlib
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import psutil

MAPS = Path("/proc/self/maps")
SHARED_MEMORY = Path("/dev/shm")
OF_PYTHON, OF_VLLM = "psm_", "vllm_dist_"
"""Prefixes of the shared-memory names that Python and vLLM choose. NCCL's names are left alone: NCCL may open them
later, when two processes first communicate."""

_unlink = SharedMemory.unlink


def unlink_open_names(sockets: Path) -> None:
    """Remove the names of this process's shared memory, and of its sockets in the folder `sockets`. What is open stays
    open, in this process and in others; no other process can open it afterwards."""
    SharedMemory.unlink = _unlink_if_there  # type: ignore[assignment,method-assign]
    bound = {Path(str(one.laddr)) for one in psutil.Process().net_connections(kind="unix") if one.laddr}
    for path in {*_mapped_names(), *(path for path in bound if path.parent == sockets)}:
        with contextlib.suppress(FileNotFoundError):  # another process removed it first
            path.unlink()
            if path.name.startswith(OF_PYTHON):
                resource_tracker.unregister(f"/{path.name}", "shared_memory")


def _unlink_if_there(memory: SharedMemory) -> None:
    """Replaces `SharedMemory.unlink`, which the owner calls when it ends and which fails where the name is gone."""
    with contextlib.suppress(FileNotFoundError):
        _unlink(memory)


def _mapped_names() -> set[Path]:
    """Shared-memory files that this process has mapped, whichever process created them."""
    lines = MAPS.read_text().splitlines() if MAPS.exists() else []
    paths = {Path(line.split(maxsplit=5)[5]) for line in lines if f" {SHARED_MEMORY}/" in line}
    return {path for path in paths if path.name.startswith((OF_PYTHON, OF_VLLM))}
