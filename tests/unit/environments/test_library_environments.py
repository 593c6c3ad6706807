"""Environments of libraries that are extras. Tests of one that is not installed are skipped."""

import asyncio
import importlib.util
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rlhf.environments.adapters import load
from rlhf.environments.environment import inspect_class
from rlhf.environments.host import describe, try_reset
from rlhf.environments.spec import WorldSpec
from rlhf.errors import ConfigError

MISSING = "{} is not installed: pip install 'rlhf[{}]'"


def gym() -> None:
    pytest.importorskip("gymnasium", reason=MISSING.format("gymnasium", "gym"))


def made(name: str) -> Any:
    return inspect_class(load(name)).build()


def test_a_text_environment_is_drawn_and_played_by_its_last_number() -> None:
    gym()
    lake = made("gym://FrozenLake-v1?is_slippery=false")
    said = lake.reset(seed=1)
    assert "[S]FFF" in said, "where the player stands is marked in text, not in color"
    assert "HFFG" in said
    assert said.endswith("Say an action: a number from 0 to 3.")
    for action in (1, 1, 2, 2, 1):
        result = lake.step(f"I go 3, no: {action}")
        assert (result.reward, result.terminated) == (0.0, False)
        assert "(" in result.observation, "the drawing names the last action"
    assert lake.step("2").reward == 1.0
    lake.close()


def test_a_turn_without_an_action_asks_again_and_moves_nothing() -> None:
    gym()
    lake = made("gym://FrozenLake-v1?is_slippery=false")
    lake.reset(seed=1)
    for count, text in enumerate(("", "north", "7", "-1"), start=1):
        result = lake.step(text)
        assert (result.observation, result.info) == ("Say an action: a number from 0 to 3.", {"unread_actions": count})
    moved = lake.step("1")
    assert (moved.info["prob"], moved.info["unread_actions"]) == (1, 4)


def test_what_is_observed_is_read_where_nothing_is_drawn_and_rows_begin_alike() -> None:
    gym()
    starts = [made("gym://Blackjack-v1").reset(messages=[{"role": "user", "content": text}]) for text in "aab"]
    assert starts[0] == starts[1]
    assert starts[0].startswith("(")
    assert len({made("gym://Blackjack-v1").reset(seed=seed) for seed in range(8)}) > 3


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gym://Chess-v9", r"Environment `Chess` doesn't exist"),
        ("gym://Pendulum-v1", "takes actions of Box, which are not read from text"),
        ("gym://FrozenLake-v1?nothing=1", "nothing"),
    ],
)
def test_what_cannot_be_played_is_refused(name: str, why: str) -> None:
    gym()
    with pytest.raises(ConfigError, match=why):
        describe(WorldSpec(environments=(name,)))


SERVER = """
import sys
import uvicorn
from openenv.core.env_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

class Say(Action):
    word: str

class Heard(Observation):
    text: str = ""

class Countdown(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self._state = State(episode_id="", step_count=0)

    def reset(self, seed=None, episode_id=None, start=3, **kwargs):
        self._left = start
        return Heard(text=f"{start} left, seed {seed}", done=False, reward=0.0)

    def step(self, action, timeout_s=None, **kwargs):
        self._left -= 1
        return Heard(text=f"{action.word}: {self._left} left", done=not self._left, reward=float(len(action.word)))

    @property
    def state(self):
        return self._state

app = create_fastapi_app(Countdown, Say, Heard, max_concurrent_envs=4)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
"""
START_TIMEOUT_S = 250.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of an OpenEnv server."""
    if importlib.util.find_spec("openenv") is None:
        pytest.skip("openenv-core, which makes servers, is not installed")
    pytest.importorskip("websockets", reason=MISSING.format("websockets", "openenv"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    (tmp_path / "server.py").write_text(SERVER)
    process = subprocess.Popen([sys.executable, str(tmp_path / "server.py"), str(port)])
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while time.monotonic() < deadline:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1.0).close()
                break
            assert process.poll() is None, "the server ended"
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def test_each_response_has_an_environment_of_a_server(server: str) -> None:
    async def play() -> list[Any]:
        first, second = (made(f"openenv://{server}?action=word&observation=text") for _ in range(2))
        said = [await first.reset(seed=7), await second.reset(options={"start": 1})]
        said += [await first.step("hello"), await second.step("bye"), await first.step("x")]
        await first.close()
        await second.close()
        return said

    opened, other, hello, bye, x = asyncio.run(play())
    assert (opened, other) == ("3 left, seed 7", "1 left, seed None")
    assert (hello.observation, hello.reward, hello.terminated) == ("hello: 2 left", 5.0, False)
    assert (bye.observation, bye.terminated) == ("bye: 0 left", True)
    assert x.observation == "x: 1 left"


def test_without_fields_turns_are_objects_and_what_is_no_object_is_told(server: str) -> None:
    async def play() -> list[Any]:
        game = made(f"openenv://{server}")
        said = [await game.reset(), await game.step("no object"), await game.step('I say {"word": "go"}')]
        await game.close()
        return said

    opened, unread, taken = asyncio.run(play())
    assert json.loads(opened)["text"] == "3 left, seed None"
    assert unread.info == {"unread_actions": 1}
    assert json.loads(taken.observation)["text"] == "go: 2 left"


def test_a_server_that_is_not_there_and_options_that_are_none_are_told() -> None:
    pytest.importorskip("websockets", reason=MISSING.format("websockets", "openenv"))
    with pytest.raises(ConfigError, match="no option port; have action, observation, secure"):
        describe(WorldSpec(environments=("openenv://127.0.0.1:1?port=2",)))
    why = try_reset(WorldSpec(environments=("openenv://127.0.0.1:1",)), {}, 60.0)
    assert why.startswith("raised ConnectionRefusedError")


def test_tasks_are_rows_and_their_verifier_scores_answers(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym", reason=MISSING.format("reasoning-gym", "reasoning-gym"))
    from rlhf.environments.adapters.reasoning_gym import main, score  # noqa: PLC0415  an extra

    out = tmp_path / "tasks.jsonl"
    main(["chain_sum", "leg_counting", "--num-rows", "5", "--seed", "3", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["task"]["name"] for row in rows] == ["chain_sum"] * 5 + ["leg_counting"] * 5
    for row in rows:
        assert "<answer>" in row["prompt"]
        assert score(f"I think <answer>{row['answer']}</answer>", row["task"]) == 1.0
        assert score(row["answer"], row["task"]) == 1.0
        assert score("<answer>no idea</answer>", row["task"]) < 0.5
    with pytest.raises(SystemExit):
        main(["no_such_task", "--out", str(out)])
