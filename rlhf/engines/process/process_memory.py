"""Peak memory of this process."""

import re
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_memory() -> int:
    """Peak bytes since the process started: of GPU memory, or of host memory where there is no GPU."""
    if "torch" in sys.modules:
        from rlhf.engines.process.device_memory import peak_device_memory  # noqa: PLC0415  the driver and reward workers have no torch

        if peak := peak_device_memory():
            return peak
    return peak_host_memory()


def peak_host_memory() -> int:
    """Peak bytes of host memory. Read from /proc/self/status where it exists: `getrusage` on Linux also counts what the
    parent process held when it started this one."""
    if STATUS.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
