"""Where programs that a model wrote are run."""

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from rlhf.config.reward import CodeSource
from rlhf.engines.rewards.child_pool import ChildPool
from rlhf.errors import RewardError

LAUNCHER = Path(__file__).with_name("sandboxed.py")
MAX_OUTPUT_BYTES = 2**20
KILL_WAIT_S = 10.0


class Sandbox(Protocol):
    """Runs Python programs where they can do no harm."""

    def run(self, programs: Sequence[str], markers: Sequence[str]) -> list[float]:
        """For each program 1.0 where it ran to its end, which is where it prints its marker as a line of its own; else
        0.0, or a share between where a sandbox of the user's knows better."""
        ...

    def close(self) -> None: ...


def open_sandbox(section: CodeSource) -> Sandbox:
    """The sandbox that a section names. Raises ConfigError where it cannot be used."""
    if section.function is not None:
        return FunctionSandbox(section)
    if section.command:
        return CommandSandbox(section.command, section)
    memory = int(section.memory_gib * 2**30)
    limits = [str(memory), str(math.ceil(section.timeout_s) + 1)]
    return CommandSandbox([sys.executable, "-I", str(LAUNCHER), *limits], section)


class FunctionSandbox:
    """The user's function (programs, markers) -> scores, in child processes."""

    def __init__(self, section: CodeSource) -> None:
        assert section.function is not None, "the caller saw to it"
        self._pool = ChildPool(
            section.function, num_processes=section.num_processes, timeout_s=section.timeout_s, memory_gib=None
        )

    def run(self, programs: Sequence[str], markers: Sequence[str]) -> list[float]:
        pairs = zip(programs, markers, strict=True)
        verdicts = self._pool.judge([{"prompts": [code], "responses": [mark], "columns": {}} for code, mark in pairs])
        scores = [verdict.score or 0.0 for verdict in verdicts]
        if any(not 0.0 <= score <= 1.0 for score in scores):
            raise RewardError(f"reward: the sandbox gave a score outside 0 to 1 ({scores}).")
        return scores

    def close(self) -> None:
        self._pool.close()


class CommandSandbox:
    """A command that runs the program on its standard input, once a program, each in an empty folder and a process
    group of its own, which is killed with all that is left of it."""

    def __init__(self, command: Sequence[str], section: CodeSource) -> None:
        self._command = list(command)
        self._timeout_s = section.timeout_s
        self._threads = ThreadPoolExecutor(section.num_processes, thread_name_prefix="reward-sandbox")

    def run(self, programs: Sequence[str], markers: Sequence[str]) -> list[float]:
        return list(self._threads.map(self._run_one, programs, markers))

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _run_one(self, program: str, marker: str) -> float:
        with tempfile.TemporaryDirectory(prefix="rlhf-sandbox-") as folder, tempfile.TemporaryFile() as source:
            # A lone surrogate is a program's own mistake, and no reason to end a run.
            source.write(program.encode(errors="replace"))
            source.seek(0)
            process = subprocess.Popen(
                self._command,
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.environ.get("PATH", ""), "LANG": "C.UTF-8", "HOME": folder},
                start_new_session=True,
            )
            assert process.stdout is not None, "a pipe was asked for"
            with process.stdout as stream:
                try:
                    output = _read(stream.fileno(), self._timeout_s)
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait(KILL_WAIT_S)
        return float(output is not None and marker.encode() in output.splitlines()[-1:])


def _read(descriptor: int, timeout_s: float) -> bytes | None:
    """All that is written until the writers end; None where that takes longer than `timeout_s`, or is too much."""
    deadline = time.monotonic() + timeout_s
    output = bytearray()
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        chunk = os.read(descriptor, 65536)
        if not chunk:
            return bytes(output)
        output += chunk
        if len(output) > MAX_OUTPUT_BYTES:
            return None
