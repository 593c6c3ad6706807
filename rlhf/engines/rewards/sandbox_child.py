"""Replaces itself by a Python that runs the program on its standard input, with limits on time, memory and files.

Started as a script with the limits as arguments: bytes of memory, seconds of CPU time.
"""

import os
import resource
import sys

MAX_FILE_BYTES = 2**20
MAX_OPEN_FILES = 64


def main() -> None:
    memory_bytes, cpu_s = int(sys.argv[1]), int(sys.argv[2])
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_FSIZE: MAX_FILE_BYTES,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    os.execv(sys.executable, [sys.executable, "-I", "-B", "-"])


if __name__ == "__main__":
    main()
