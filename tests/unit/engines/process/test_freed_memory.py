"""What a process keeps of the memory that it has freed."""

import subprocess
import sys

import pytest

from rlhf.engines.process.freed_memory import keep_freed_memory

MEASURE = """
import ctypes, sys
import psutil
from rlhf.engines.process.freed_memory import keep_freed_memory

if sys.argv[1] == "keeps":
    assert keep_freed_memory({"PATH": "/bin"})
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
size = 200 << 20
process = psutil.Process()
before = process.memory_info().rss
block = libc.malloc(size)
ctypes.memset(block, 1, size)
assert process.memory_info().rss - before > 0.9 * size
libc.free(ctypes.c_void_p(block))
print((process.memory_info().rss - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's parameters")
@pytest.mark.parametrize(("what", "least", "most"), [("keeps", 0.9, 1.1), ("does not", -0.1, 0.1)])
def test_a_large_block_that_was_freed_stays(what: str, least: float, most: float) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, what], capture_output=True, text=True, check=True)
    assert least < float(done.stdout) < most


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_an_allocator_that_the_user_has_configured_is_left_alone(name: str) -> None:
    assert not keep_freed_memory({name: "1"})
