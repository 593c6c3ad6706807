"""How much memory this process has held at most."""

import resource
import sys


def peak_memory() -> int:
    """Bytes since the process began: of its GPU's memory, or without one of host memory."""
    if "torch" in sys.modules:
        from rlhf.engines.device_memory import peak_device_memory  # noqa: PLC0415  the driver and reward workers have no torch

        if peak := peak_device_memory():
            return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
