"""A control store that accepts no connection any more is noticed; one that is busy is not taken for lost."""

import socket
import threading

import pytest

from rlhf.actors import control_store
from rlhf.actors.control_store import ControlStoreWatch
from rlhf.errors import WorkerLostError

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_store, "POLL_S", 0.02)


def listener() -> tuple[socket.socket, str]:
    server = socket.create_server(("127.0.0.1", 0))
    return server, "{}:{}".format(*server.getsockname())


def test_one_that_is_gone_is_reported_once_with_its_address() -> None:
    server, address = listener()
    errors: list[WorkerLostError] = []
    lost = threading.Event()

    def on_lost(error: WorkerLostError) -> None:
        errors.append(error)
        lost.set()

    watch = ControlStoreWatch(address, on_lost, timeout_s=0.2)
    assert not lost.wait(0.5), "a server that never accepts by itself is busy, not lost"
    server.close()
    assert lost.wait(10)
    watch.stop()
    (error,) = errors
    assert f"ray: the control store (gcs_server) at {address} has accepted no connection for" in str(error)


def test_leaving_the_cluster_ends_the_watch() -> None:
    server, address = listener()
    lost = threading.Event()
    watch = ControlStoreWatch(address, lambda _error: lost.set(), timeout_s=0.2)
    watch.stop()
    server.close()
    assert not lost.wait(0.6)


def test_one_that_is_being_lost_is_still_reported_after_the_run_began_to_leave() -> None:
    server, address = listener()
    lost = threading.Event()
    watch = ControlStoreWatch(address, lambda _error: lost.set(), timeout_s=0.5)
    server.close()
    while watch.is_answered:
        threading.Event().wait(0.01)
    watch.stop()
    assert lost.wait(10)
