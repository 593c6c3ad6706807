"""What tests share: a user's folder with the command in it, a Ray cluster to join, and a port."""

from collections.abc import Iterator

import pytest

from tests.integration.command_line import CommandLine, write_workplace
from tests.integration.ports import held_port
from tests.integration.ray_head import RayHead, start_ray_head


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


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Where ranks that a test starts can meet."""
    with held_port() as port:
        yield port
