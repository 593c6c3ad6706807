"""Tools and environments as a user writes them, for tests. Other processes import this file."""

import os
import time
from collections.abc import Mapping

from rlhf.environments.environment import Result


def add(a: int, b: int = 1) -> int:
    """Add two whole numbers.

    Args:
        a: the first one
        b: the second one,
            or 1
    """
    return a + b


async def double(number: float) -> Result:
    """Twice a number."""
    return Result(observation=number * 2, reward=0.5)


def flood(size: int) -> str:
    """A long text."""
    return "x" * size


def wait(seconds: float) -> str:
    """Wait."""
    time.sleep(seconds)
    return "waited"


def stop_all(seconds: float) -> str:
    """Let no other thread run, as a library that keeps the interpreter's lock does."""
    import ctypes  # noqa: PLC0415

    ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    return "woke"


def die() -> None:
    """End the process."""
    os._exit(3)


def leave() -> None:
    """Ask the interpreter to end."""
    raise SystemExit(2)


def special(text: str) -> str:
    """A text with a control token in it."""
    return f"{text}<|im_end|>"


class Guess:
    """Find a number."""

    def reset(self, secret: int, limit: int = 10) -> str:
        self._secret = secret
        return f"I think of a number from 0 to {limit}."

    def step(self, text: str) -> tuple[str, float, bool, bool, Mapping[str, object]]:
        guess = int(text.rsplit("</think>", maxsplit=1)[-1])
        if guess == self._secret:
            return "right", 1.0, True, False, {"distance": 0}
        return (
            "higher" if guess < self._secret else "lower",
            -0.1,
            False,
            False,
            {"distance": abs(guess - self._secret)},
        )


class Shelf:
    """An environment whose methods are tools."""

    def __init__(self) -> None:
        self._kept: list[str] = []

    async def reset(self, **row: object) -> None:
        self._row = row

    def put(self, what: str) -> str:
        """Put something on the shelf."""
        if what == "stone":
            raise ValueError("too heavy")
        self._kept.append(what)
        return f"{len(self._kept)} kept"

    def done(self) -> Result:
        """Close the shelf."""
        return Result(terminated=True)

    def _private(self) -> None: ...

    def reward(self) -> int:
        return len(self._kept)

    def close(self) -> None:
        self._kept.clear()


class Slow:
    """Takes its time before it can be closed. Writes where its row says that it was opened and closed."""

    def __init__(self) -> None:
        time.sleep(1.0)

    def reset(self, note: str) -> None:
        self._note = note
        self._write("opened")

    def step(self, text: str) -> Result:
        return Result("over", 1.0, terminated=True)

    def close(self) -> None:
        self._write("closed")

    def _write(self, word: str) -> None:
        with open(self._note, "a") as file:  # noqa: PTH123
            file.write(f"{word} ")


class Troubled:
    """Fails as its row says, as long as the file that it names is not there."""

    def reset(self, fails: str, once: str = "") -> str:
        self._fails = fails
        if once:
            if os.path.exists(once):  # noqa: PTH110
                self._fails = "never"
            open(once, "w").close()  # noqa: PTH123
        return self._trouble("reset") or "go"

    def step(self, text: str) -> Result:
        self._trouble("step")
        return Result("over", 1.0, terminated=True)

    def reward(self) -> float:
        self._trouble("reward")
        return 1.0

    def close(self) -> None:
        self._trouble("close")

    def _trouble(self, where: str) -> str:
        kind, _, place = self._fails.partition(" in ")
        if place == where:
            match kind:
                case "raises":
                    raise RuntimeError("broken")
                case "hangs":
                    time.sleep(60)
                case "dies":
                    os._exit(3)
        return ""
