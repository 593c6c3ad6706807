"""Tools that do what no tool should, for tests. Other processes import this file."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from rlhf.environments.environment import Result


def sleeps() -> str:
    """Sleep for a minute."""
    time.sleep(60)
    return "woke"


async def waits() -> str:
    """Wait for a minute."""
    await asyncio.sleep(60)
    return "woke"


async def blocks() -> str:
    """Sleep for a minute where others wait for events."""
    time.sleep(60)
    return "woke"


def spins() -> str:
    """Compute for a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        pass
    return "woke"


def holds() -> str:
    """Keep all other threads from running for a minute."""
    import ctypes  # noqa: PLC0415

    ctypes.PyDLL(None).usleep(60_000_000)
    return "woke"


def raises() -> str:
    """Raise."""
    raise ValueError("no " * 10_000_000)


def raises_half_an_emoji() -> str:
    """Raise with a text that is none."""
    raise ValueError("no \x00 in \ud83d")


def finds_nothing() -> object:
    """Take the first of none."""
    return next(iter(()))


def exits() -> None:
    """Ask the interpreter to end."""
    sys.exit("over")


async def exits_later() -> None:
    """Ask the interpreter to end, from its event loop."""
    sys.exit("over")


def is_cancelled() -> None:
    """Raise what ends a task."""
    raise asyncio.CancelledError("by a library")


async def is_cancelled_later() -> None:
    """Raise what ends a task, from one."""
    raise asyncio.CancelledError("by a library")


def returns_much() -> dict[str, object]:
    """Return 100 MB."""
    return {"text": "x" * 100_000_000}


def prints_much() -> str:
    """Print 100 MB."""
    for _ in range(1000):
        sys.stdout.write("x" * 99 + "\n" + "y" * 99_900)
    sys.stdout.flush()
    return "printed"


def leaves() -> str:
    """Leave two processes behind, one of them out of reach of its group."""
    for _ in range(2):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    return "left"


def multiplies(seconds: float) -> str:
    """Start processes that start processes, for some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        os.fork()
    os._exit(0)


def connects(address: str, port: int) -> str:
    """Connect to somebody."""
    with socket.create_connection((address, port), timeout=5):
        return "connected"


def talks_to_itself() -> str:
    """Listen, and connect."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        return "connected"


def pid(note: str) -> str:
    """Write the process's id into a file."""
    Path(note).write_text(str(os.getpid()))
    return "noted"


def slow(note: str) -> str:
    """The first call writes the process's id into a file, and waits to be killed."""
    _wait_the_first_time(note)
    return "done"


class Victim:
    """In the method that its row names, writes its process's id into a file and waits to be killed, the first time."""

    def reset(self, place: str, note: str) -> str:
        self._place, self._note = place, note
        return self._pass("reset") or "go"

    def step(self, text: str) -> Result:
        self._pass("step")
        return Result("over", 1.0, terminated=True)

    def reward(self) -> float:
        self._pass("reward")
        return 1.0

    def close(self) -> None:
        self._pass("close")

    def _pass(self, place: str) -> str:
        if place == self._place:
            _wait_the_first_time(self._note)
        return ""


def _wait_the_first_time(note: str) -> None:
    path = Path(note)
    if path.exists():
        return
    written = path.with_suffix(".part")
    written.write_text(str(os.getpid()))
    written.rename(path)
    time.sleep(60)
