"""Names that a killed process would leave behind."""

import contextlib
import socket
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from rlhf.engines.process.open_names import SHARED_MEMORY, unlink_open_names

pytestmark = pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="this system shows no shared memory as files")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[SharedMemory]:
    monkeypatch.setattr(SharedMemory, "unlink", SharedMemory.unlink)  # the function under test replaces it
    memory = SharedMemory(create=True, size=16)
    yield memory
    memory.close()
    with contextlib.suppress(FileNotFoundError):
        memory.unlink()


def test_shared_memory_stays_usable_without_its_name(memory: SharedMemory, tmp_path: Path) -> None:
    also = SharedMemory(name=memory.name)
    unlink_open_names(tmp_path)
    assert not (SHARED_MEMORY / memory.name).exists()
    assert memory.buf is not None
    assert also.buf is not None
    memory.buf[0] = 7
    assert also.buf[0] == 7
    memory.unlink()  # as its owner does in the end
    also.close()


def test_a_socket_stays_usable_without_its_name(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as other,
        socket.socket(socket.AF_UNIX) as client,
    ):
        listener.bind(str(tmp_path / "here"))
        other.bind(str(elsewhere / "there"))
        listener.listen()
        client.connect(str(tmp_path / "here"))
        unlink_open_names(tmp_path)
        assert list(tmp_path.rglob("*")) == [elsewhere, elsewhere / "there"]
        connection, _ = listener.accept()
        with connection:
            client.sendall(b"x")
            assert connection.recv(1) == b"x"
