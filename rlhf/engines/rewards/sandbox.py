"""Sandboxes for programs that a model wrote."""

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
from rlhf.engines.rewards.child_pool import ChildPool, call_with
from rlhf.errors import RewardError
from rlhf.repair import Repaired

LAUNCHER = Path(__file__).with_name("sandbox_child.py")
MAX_OUTPUT_BYTES = 2**20
KILL_WAIT_S = 10.0


class Sandbox(Protocol):
    """Runs Python programs in isolation."""

    def run(self, programs: Sequence[str], markers: Sequence[str]) -> list[float]:
        """For each program 1.0 if it ran to its end, where it prints its marker on a line of its own; else 0.0. A
        user's sandbox may return values in between."""
        ...

    def close(self) -> None: ...


def open_sandbox(section: CodeSource, repaired: Repaired) -> Sandbox:
    """The sandbox of a config section. Raises ConfigError if it cannot be used."""
    if section.function is not None:
        return FunctionSandbox(section, repaired)
    if section.command:
        return CommandSandbox(section.command, section)
    memory = int(section.memory_gib * 2**30)
    limits = [str(memory), str(math.ceil(section.timeout_s) + 1)]
    return CommandSandbox([sys.executable, "-I", str(LAUNCHER), *limits], section)


class FunctionSandbox:
    """The user's function (programs, markers) -> scores, in child processes."""

    def __init__(self, section: CodeSource, repaired: Repaired) -> None:
        assert section.function is not None, "the caller checked it"
        self._pool = ChildPool(
            section.function,
            num_processes=section.num_processes,
            timeout_s=section.timeout_s,
            memory_gib=None,
            repaired=repaired,
        )

    def run(self, programs: Sequence[str], markers: Sequence[str]) -> list[float]:
        pairs = zip(programs, markers, strict=True)
        by_name = {"programs", "markers"} <= self._pool.parameters
        verdicts = self._pool.evaluate(
            [call_with(programs=code, markers=mark) if by_name else call_with(code, mark) for code, mark in pairs]
        )
        scores = [verdict.score or 0.0 for verdict in verdicts]
        if any(not 0.0 <= score <= 1.0 for score in scores):
            raise RewardError(f"reward: the sandbox gave a score outside 0 to 1 ({scores}).")
        return scores

    def close(self) -> None:
        self._pool.close()


class CommandSandbox:
    """Runs a command for each program, with the program on its standard input. Each has an empty folder and a process
    group of its own, which is killed afterwards."""

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
            # A lone surrogate is a program's own mistake, and must not end the run.
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
            assert process.stdout is not None, "stdout is a pipe"
            with process.stdout as stream:
                try:
                    output = _read(stream.fileno(), self._timeout_s)
                finally:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait(KILL_WAIT_S)
        return float(output is not None and marker.encode() in output.splitlines()[-1:])


def _read(descriptor: int, timeout_s: float) -> bytes | None:
    """All output until the writers end; None if that takes longer than `timeout_s`, or exceeds MAX_OUTPUT_BYTES."""
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
