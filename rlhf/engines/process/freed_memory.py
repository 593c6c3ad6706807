"""Memory that a rank on a CPU has freed stays with its process, for the next pass.

Pages from the kernel have to be zeroed, which takes a tenth of a small model's step.
"""

import ctypes
from collections.abc import Mapping

ALLOCATOR_VARIABLES = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Variables by which a user configures the allocator."""
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
MOST_KEPT = 2**31 - 1
"""Bytes: glibc's parameters are C integers."""


def keep_freed_memory(environ: Mapping[str, str]) -> bool:
    """Let the allocator of this process keep up to 2 GiB of freed memory. Returns whether it does: it is left alone
    where it is not glibc's, or where the user has configured it."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith(ALLOCATOR_VARIABLES) for name in environ):
        return False
    # Large blocks come from the heap too, and its end is given back where more than that is free.
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, MOST_KEPT))
