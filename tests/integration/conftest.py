"""What tests share: a user's folder with the command in it, a Ray cluster to join, and a port."""

import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import pytest

from tests.integration.command_line import CommandLine, write_workplace
from tests.integration.ports import held_port
from tests.integration.rank_processes import RankProcesses
from tests.integration.ray_head import RayHead, start_ray_head

ROOTS = tuple(str(Path(__file__).parents[2] / name) for name in ("rlhf", "tests", "benchmarks"))
MODULES = ("rlhf.", "tests.", "benchmarks.")


def pytest_configure() -> None:
    """Let a process that nobody waited for fail a test if it is one of ours, and only be named if a library left it.

    Python tells of such a process when its object is collected: in any later test, without a word of what it ran.
    """
    collect = vars(subprocess.Popen)["__del__"]

    def collect_telling(process: "subprocess.Popen[str]") -> None:
        collect(process, _warn=partial(tell_left, process))

    setattr(subprocess.Popen, "__del__", collect_telling)  # noqa: B010  the checker knows no such method


def tell_left(process: "subprocess.Popen[str]", text: str, category: type[Warning], source: object) -> None:
    """In place of `warnings.warn` for a process that nobody waited for."""
    words = [process.args] if isinstance(process.args, str) else list(map(str, cast(Sequence[object], process.args)))
    text = f"{text}: {' '.join(words)}"
    if any(word.startswith((*ROOTS, *MODULES)) for word in words):
        warnings.warn(text, category, source=source, stacklevel=3)
    else:
        sys.stderr.write(f"{text}\n")


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """`rlhf` in a user's folder."""
    folder = tmp_path_factory.mktemp("user")
    write_workplace(folder)
    command = CommandLine(folder)
    yield command
    command.close()


@pytest.fixture(scope="session")
def head() -> Iterator[RayHead]:
    """A Ray cluster that runs may join; it starts once, which saves each run the time."""
    head = start_ray_head()
    yield head
    head.stop()


@pytest.fixture(scope="session")
def rank_processes(tmp_path_factory: pytest.TempPathFactory) -> RankProcesses:
    """Ranks without Ray."""
    return RankProcesses(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Where ranks that a test starts can meet."""
    with held_port() as port:
        yield port
