"""Tools that hang, raise, flood, fork or connect, and processes that are killed: each meets its limit, and says so."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rlhf.environments.host import Host, HostLostError, HostOverranError
from rlhf.environments.spec import WorldSpec
from rlhf.episode import Ending, EpisodeRollout
from rlhf.errors import RewardError
from rlhf.types import Json
from tests.unit.environments.playing import Make, Play, call, says
from tests.unit.environments.support import make_request

pytestmark = pytest.mark.timeout(90)

HERE = "tests.unit.environments.bad_tools:"
TIMEOUT_S = 1.5


def spec_of(*tools: str, network: bool = True, max_processes: int = 256) -> WorldSpec:
    return WorldSpec(tools=tuple(HERE + name for name in tools), network=network, max_processes=max_processes)


def asked(spec: WorldSpec, name: str, timeout_s: float = 20.0, **arguments: Json) -> str:
    """What a tool replies, or what became of its process."""

    async def ask() -> str:
        host = await Host.start(spec)
        request: dict[str, Json] = {"op": "call", "episode": "e", "name": name, "arguments": arguments}
        try:
            reply = await host.ask(request, timeout_s)
            return str(reply.get("raised", reply.get("text")))
        except (HostLostError, HostOverranError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            await host.close()

    return asyncio.run(ask())


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """Stands in the environment of every process that the test starts."""
    value = f"{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv("RLHF_TEST_MARK", value)
    return value


def marked(mark: str) -> list[int]:
    """The processes that have a mark, but this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RLHF_TEST_MARK") == mark:
                found.append(process.pid)
    return found


@pytest.mark.parametrize("name", ["sleeps", "waits", "spins"])
def test_a_wedged_tool_is_late_and_others_go_on(name: str) -> None:
    assert asked(spec_of(name), name, TIMEOUT_S) == "HostOverranError: took over 1.5 s"


def test_a_process_that_is_stopped_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads nothing any more: requests wait in a pipe that is full."""
    monkeypatch.setattr("rlhf.environments.host.PING_TIMEOUT_S", 0.5)

    def request(name: str, **arguments: Json) -> dict[str, Json]:
        return {"op": "call", "episode": "e", "name": name, "arguments": arguments, "padding": "x" * 50_000}

    async def ask() -> list[object]:
        host = await Host.start(spec_of("pid"))
        await host.ask(request("pid", note=str(tmp_path / "pid")), 20.0)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGSTOP)
        calls = [host.ask(request("pid", note="unused"), TIMEOUT_S) for _ in range(40)]
        replies = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
        with pytest.raises(HostLostError):
            host.begin(request("pid"))
        await host.close()
        return list(replies)

    assert {type(reply) for reply in asyncio.run(ask())} <= {HostLostError, HostOverranError}


@pytest.mark.parametrize("name", ["blocks", "holds"])
def test_a_tool_that_stops_all_others_ends_its_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.environments.host.PING_TIMEOUT_S", 1.0)
    assert asked(spec_of(name), name, TIMEOUT_S) == "HostLostError: answered none of its calls any more"


def test_an_exception_is_short() -> None:
    assert asked(spec_of("raises"), "raises") == f"ValueError: {'no ' * 167}"[:512]


def test_an_exception_is_text_that_a_tokenizer_takes() -> None:
    assert asked(spec_of("raises_half_an_emoji"), "raises_half_an_emoji") == "ValueError: no \ufffd in ?"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("finds_nothing", "StopIteration"),
        ("exits", "SystemExit: over"),
        ("exits_later", "SystemExit: over"),
        ("is_cancelled", "CancelledError: by a library"),
        ("is_cancelled_later", "CancelledError: by a library"),
    ],
)
def test_what_ends_a_thread_or_a_process_is_an_error_as_any_other(name: str, text: str) -> None:
    assert asked(spec_of(name), name) == f"RuntimeError: {text}"


def test_a_hundred_megabytes_are_cut_before_they_leave_the_process() -> None:
    text = asked(spec_of("returns_much"), "returns_much")
    assert len(text) < 500_000
    assert "characters left out" in text


def test_a_hundred_megabytes_of_output_do_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert asked(spec_of("prints_much"), "prints_much") == "printed"
    deadline = time.monotonic() + 20
    while "bytes left out" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "bytes left out" in caplog.text
    assert len(caplog.text) < 5_000_000


def test_what_a_tool_leaves_behind_ends_with_its_process(mark: str) -> None:
    assert asked(spec_of("leaves"), "leaves") == "left"
    assert marked(mark) == []


def test_too_many_processes_are_ended_all_at_once(mark: str) -> None:
    before = time.monotonic()
    text = asked(spec_of("multiplies", max_processes=40), "multiplies", seconds=30)
    assert text == "HostLostError: was ended, because more than 40 processes were started from it"
    assert time.monotonic() - before < 25, "they do not end by themselves"
    assert marked(mark) == []


@pytest.mark.parametrize("network", [True, False])
def test_the_network_can_be_denied(network: bool) -> None:
    if not network:
        _require_namespaces()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        said = asked(spec_of("connects", network=network), "connects", address="127.0.0.1", port=port)
    assert said == ("connected" if network else "ConnectionRefusedError: [Errno 111] Connection refused")


def test_without_a_network_a_tool_still_reaches_itself() -> None:
    _require_namespaces()
    spec = spec_of("talks_to_itself", "connects", network=False)
    assert asked(spec, "talks_to_itself") == "connected"
    assert asked(spec, "connects", address="192.0.2.1", port=9) == "OSError: [Errno 101] Network is unreachable"


def test_a_kernel_that_cannot_deny_the_network_is_refused(tmp_path: Path) -> None:
    """In a user namespace that allows no further ones."""
    _require_namespaces()
    forbid = "echo 0 > /proc/sys/user/max_user_namespaces"
    if subprocess.run(["unshare", "-Ur", "sh", "-c", forbid], check=False, capture_output=True).returncode:
        pytest.skip("the limits of user namespaces cannot be written here")
    (tmp_path / "own.py").write_text('def look(what: str) -> str:\n    """Look."""\n    return what\n')
    (tmp_path / "d.jsonl").write_text('{"prompt": "What is 1+1?", "answer": "2"}\n')
    given = "check grpo --policy.model m --data.path d.jsonl --rollout.tools own:look --reward.rules number"
    fewest = "--rollout.batch-size 1 --rollout.group-size 2 --train.batch-size 2"
    command = f"{sys.executable} -m rlhf.cli.main {given} {fewest} --no-rollout.environment-network"
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", f"{forbid} && exec {command}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "rollout.environment_network: false is not possible here (unshare: No space left" in done.stderr


@pytest.mark.parametrize("place", ["reset", "step", "reward"])
def test_an_environment_whose_process_is_killed_begins_anew(play: Make, place: str, tmp_path: Path) -> None:
    game = play(says("a"), environment="bad_tools:Victim").row(place=place, note=str(tmp_path / "pid"))
    episode = _killed(game, tmp_path / "pid").episode
    assert (episode.ending, episode.num_retries, episode.reward) == (Ending.TERMINATED, 1, 2.0)
    assert "its process was killed by SIGKILL" in game.repairs[0].text


def test_a_process_that_is_killed_while_environments_close_changes_nothing(play: Make, tmp_path: Path) -> None:
    game = play(says("a"), environment="bad_tools:Victim").row(place="close", note=str(tmp_path / "pid"))
    episode = _killed(game, tmp_path / "pid").episode
    assert (episode.ending, episode.num_retries, episode.reward) == (Ending.TERMINATED, 0, 2.0)
    assert game.once("next").episode.reward == 2.0


def test_a_killed_environment_can_end_the_run(play: Make, tmp_path: Path) -> None:
    game = play(says("a"), environment="bad_tools:Victim", num_retries=0, on_error="fail")
    with pytest.raises(RewardError, match=r"turn 1: step\(\): its process was killed by SIGKILL \(1 tries\)") as caught:
        _killed(game.row(place="step", note=str(tmp_path / "pid")), tmp_path / "pid")
    assert caught.value.exit_code == 4


def test_a_function_whose_process_is_killed_is_called_once_more(play: Make, tmp_path: Path) -> None:
    game = play(says(call("slow", note=str(tmp_path / "pid")), "over"), "bad_tools:slow")
    episode = _killed(game, tmp_path / "pid").episode
    assert [said.content for said in episode.messages if said.role == "tool"] == ["done"]
    assert episode.num_failed_calls == 0


def _killed(game: Play, note: Path) -> EpisodeRollout:
    """Play an episode; whoever writes its process id into `note` is killed."""
    (future,) = game.episodes.submit([make_request(game.prompt)])
    deadline = time.monotonic() + 30
    while not note.exists():
        assert time.monotonic() < deadline, "nobody waits to be killed"
        time.sleep(0.01)
    os.kill(int(note.read_text()), signal.SIGKILL)
    rollout = future.result(50)
    assert isinstance(rollout, EpisodeRollout)
    return rollout


def _require_namespaces() -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Un", "true"], check=False).returncode:
        pytest.skip("the kernel allows no user namespaces")
