"""How much memory this process has held at most."""

import re
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_memory() -> int:
    """Bytes since the process began: of its GPU's memory, or without one of host memory."""
    if "torch" in sys.modules:
        from rlhf.engines.process.device_memory import peak_device_memory  # noqa: PLC0415  the driver and reward workers have no torch

        if peak := peak_device_memory():
            return peak
    return peak_host_memory()


def peak_host_memory() -> int:
    """Bytes of host memory. What Linux tells of a process begins with what its parent held when it started this one,
    but in its status."""
    if STATUS.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
