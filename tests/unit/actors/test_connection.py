"""Which clusters a run joins, and where its processes meet."""

import platform
import re
import signal
import socket
import subprocess
from types import SimpleNamespace

import pytest
import ray
from ray._private import worker as ray_worker
from ray._private.utils import check_version_info

from rlhf.actors import connection
from rlhf.actors.connection import differing_versions, disconnect, join, log_message, require_token, token_problem
from rlhf.actors.orphans import OrphanWatch
from rlhf.engines.process.rendezvous import interface_of, join_store, open_listener, serve_store
from rlhf.errors import ConfigError, WorkerLostError
from rlhf.repair import Repair


def test_a_cluster_that_asks_for_no_token_is_refused() -> None:
    nodes = ["127.0.0.1", "10.0.0.5", "fd00::1"]
    with pytest.raises(
        ConfigError, match=r"beyond loopback \(10\.0\.0\.5, fd00::1\) .* cluster\.allow_unauthenticated"
    ):
        require_token(nodes, has_token=False)
    require_token(nodes, has_token=True)


def test_a_cluster_of_this_machine_needs_none() -> None:
    require_token(["127.0.0.1", "127.0.0.3", "::1", "::ffff:127.0.0.1", "localhost"], has_token=False)


def test_a_cluster_of_other_versions_is_named_with_both() -> None:
    with pytest.raises(RuntimeError, match="Version mismatch") as caught:
        check_version_info({"ray_version": "2.52.0", "python_version": "3.10.4"}, "10.0.0.5:6379")
    told = differing_versions(str(caught.value))
    ours = f"this process Ray {ray.__version__} on Python {platform.python_version()}"
    assert told == f"the cluster at that address has Ray 2.52.0 on Python 3.10.4, {ours}; use the same on both."
    assert differing_versions("Could not read the store. Ray: 1 Python: 2") is None


@pytest.mark.parametrize(
    ("environ", "text", "why"),
    [
        ({}, "Authentication token is missing or incorrect", "RAY_AUTH_MODE=token is not set here"),
        ({"RAY_AUTH_MODE": "token"}, "but no authentication token was found.", "there is none here"),
        ({"RAY_AUTH_MODE": "token"}, "Authentication token is missing or incorrect", "it rejects the one that is here"),
    ],
)
def test_a_cluster_that_wants_a_token_says_so(environ: dict[str, str], text: str, why: str) -> None:
    told = token_problem("10.0.0.5:6379", text, environ)
    assert told.startswith(f"the cluster at 10.0.0.5:6379 needs a token, and {why}. Set RAY_AUTH_MODE=token, ")


@pytest.mark.parametrize("address", ["http://h:8265", "ray://h:10001", "10.0.0.5", ":6379", "h:port"])
def test_an_address_of_another_kind_is_told_at_once(address: str) -> None:
    with pytest.raises(ConfigError, match=rf"^cluster\.address or .* HOST:PORT .* \(got {re.escape(address)}\)"):
        join(address, "test")


def test_a_store_listens_on_its_address_alone() -> None:
    listener = open_listener("127.0.0.1")
    port = listener.getsockname()[1]
    served = serve_store(listener, 10.0)
    joined = join_store("127.0.0.1", port, 10.0)
    served.set("key", "value")
    assert joined.get("key") == b"value"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), timeout=5.0)


def test_an_address_that_is_not_ours_is_named() -> None:
    with pytest.raises(WorkerLostError, match=r"cannot listen on 192\.0\.2\.1:0: "):
        open_listener("192.0.2.1")


def test_an_interface_is_found_by_its_address() -> None:
    assert interface_of("127.0.0.1") == interface_of("127.0.0.3") is not None
    assert interface_of("192.0.2.1") is None


def test_a_start_that_had_to_be_repeated_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[object] = []
    for name, value in {**connection.LOCAL_ENVIRONMENT, connection.CONTROL_STORE_WAIT: "1"}.items():
        monkeypatch.setenv(name, value)  # so that what a start sets is forgotten

    def init(**_: object) -> None:
        starts.append(None)
        if len(starts) == 1:
            raise RuntimeError("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    told: list[Repair] = []
    connection.start("test", told.append).close()
    (repair,) = told
    assert repair.text == "ray: did not start (The current node timed out during startup.); it was started once more"
    connection.start("test", told.append).close()
    assert len(told) == 1


def test_processes_that_ray_gives_up_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["sleep", "600"])

    def give_up() -> None:
        """As Ray's shutdown on a busy machine: it has sent the signal, and waits no longer."""
        process.kill()

    node = SimpleNamespace(all_processes={"raylet": [SimpleNamespace(process=process)]})
    monkeypatch.setattr(ray_worker, "_global_node", node)
    monkeypatch.setattr(ray, "shutdown", give_up)
    disconnect(OrphanWatch())
    assert process.returncode == -signal.SIGKILL


def test_a_process_that_never_joined_disconnects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_worker, "_global_node", None)
    disconnect(OrphanWatch())


def test_of_what_ray_prints_one_sentence_is_logged_and_no_death_twice(caplog: pytest.LogCaptureFixture) -> None:
    texts = [
        "Raylet is terminated. Termination is unexpected. Last 20 lines of the Raylet logs:\n    [state-dump] more\n",
        "2 Workers (tasks / actors) killed due to memory pressure (OOM) at node (ID: a, IP: b)\nTo see more, ...",
        "A worker died or was killed while executing a task by an unexpected system error. To troubleshoot ...",
    ]
    log_message({"lines": texts, "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert [record.message for record in caplog.records] == [
        "ray: Raylet is terminated.",
        "ray: 2 Workers (tasks / actors) killed due to memory pressure (OOM) at node (ID: a, IP: b).",
    ]
