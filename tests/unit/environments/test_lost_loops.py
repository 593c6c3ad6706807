"""The endpoint of users' own loops in the matrix of kills: the process of a loop killed, or its connection cut, at the
first request, at a later turn, and after the reward."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.environments.engine import _by_content
from rlhf.episode import Ending, EpisodeRollout
from rlhf.errors import RewardError
from tests.unit.environments.playing import Play, says
from tests.unit.environments.support import Script

pytestmark = pytest.mark.timeout(150)
LOOPS = "tests.unit.environments.own_loops:"
PLACES = pytest.mark.parametrize("turn", [0, 1], ids=["first request", "later turn"])


def waits_at(turn: int) -> Script:
    """The engine does not answer this turn."""
    return lambda seen, asked: None if asked == turn else "a"


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Lost:
    """An episode of a loop, and what it can lose."""

    def __init__(self, folder: Path) -> None:
        self.note = folder / "pid"
        self.game: Play

    def open(self, name: str, script: Script, **settings: object) -> Play:
        self.game = Play(script, agent=LOOPS + name, timeout_s=60.0, **settings)  # type: ignore[arg-type]
        prompt = self.game.prompt
        self.game.prompt = replace(prompt, metadata={**prompt.metadata, "note": str(self.note)})
        self.game.episodes._prompts = _by_content([self.game.prompt])
        return self.game

    def kill(self) -> None:
        os.kill(int(self.note.read_text()), signal.SIGKILL)

    def cut(self) -> None:
        """Cut all connections of the endpoint."""
        endpoint = self.game.episodes._endpoint
        assert endpoint is not None
        assert endpoint._runner is not None
        server = endpoint._runner.server
        assert server is not None
        connections = list(server.connections)
        assert connections

        def abort() -> None:
            for connection in connections:
                if connection.transport is not None:
                    connection.transport.abort()

        self.game.episodes._loop.call_soon_threadsafe(abort)


@pytest.fixture
def lost(tmp_path: Path) -> Iterator[Lost]:
    lost = Lost(tmp_path)
    yield lost
    lost.game.episodes.close()


def require_anew(game: Play, rollout: object) -> None:
    """It is the episode that it would have been, with a turn's tokens once."""
    assert isinstance(rollout, EpisodeRollout)
    episode = rollout.episode
    assert (episode.ending, episode.num_retries, episode.num_turns, episode.reward) == (Ending.ANSWER, 1, 2, 1.0)
    assert len(game.repairs) == 1
    names = [request.id for request in game.engine.requests]
    assert len(set(names)) == len(names), "what began anew asks for turns of its own"


@PLACES
def test_a_loop_whose_process_is_killed_begins_anew(lost: Lost, turn: int) -> None:
    game = lost.open("leaves_its_number", waits_at(turn))
    future = game.submit()
    wait_for(lambda: game.engine._waiting)
    lost.kill()
    wait_for(lambda: game.repairs)
    assert f"turn {turn + 1}: run(): its process was killed by SIGKILL; its episode begins" in game.repairs[0].text
    wait_for(lambda: game.engine.aborted)
    assert game.engine.aborted == [f"1/row 1/0/turn{turn}"], "the engine need not go on with a turn of nobody's"
    game.engine.script = says("a", "b")
    game.engine.answer_waiting()
    require_anew(game, future.result(60))


@PLACES
def test_a_connection_that_is_cut_is_the_same_turn_for_a_client_that_asks_again(lost: Lost, turn: int) -> None:
    game = lost.open("has_a_client_that_asks_again", waits_at(turn))
    future = game.submit()
    wait_for(lambda: game.engine._waiting)
    lost.cut()
    time.sleep(2.0)
    game.engine.script = says("a", "b")
    game.engine.answer_waiting()
    rollout = future.result(60)
    assert isinstance(rollout, EpisodeRollout)
    episode = rollout.episode
    assert (episode.num_retries, episode.num_turns, episode.num_segments, episode.reward) == (0, 2, 1, 1.0)
    assert len(game.engine.requests) == 2


@PLACES
def test_a_connection_that_is_cut_fails_a_loop_that_does_not_ask_again(lost: Lost, turn: int) -> None:
    game = lost.open("leaves_its_number", waits_at(turn))
    future = game.submit()
    wait_for(lambda: game.engine._waiting)
    lost.cut()
    wait_for(lambda: game.repairs)
    assert f"turn {turn + 1}: run() raised RemoteProtocolError: " in game.repairs[0].text
    game.engine.script = says("a", "b")
    game.engine.answer_waiting()
    require_anew(game, future.result(60))


@pytest.mark.parametrize("what", ["process", "connection"])
def test_what_is_lost_after_the_reward_changes_nothing(lost: Lost, what: str) -> None:
    game = lost.open("has_a_client_that_asks_again", says("a", "b"))
    for name in ("first", "next"):
        rollout = game.submit(name).result(60)
        assert isinstance(rollout, EpisodeRollout)
        assert (rollout.episode.num_retries, rollout.episode.reward) == (0, 1.0)
        if name == "first":
            if what == "process":
                lost.kill()
                time.sleep(1.0)
            else:
                lost.cut()
    assert not game.repairs


def test_a_loop_that_is_lost_can_end_the_run(lost: Lost) -> None:
    """With exit code 4, that of RewardError."""
    game = lost.open("leaves_its_number", waits_at(0), on_error="fail", num_retries=0)
    future = game.submit()
    wait_for(lambda: game.engine._waiting)
    lost.kill()
    with pytest.raises(
        RewardError, match=r"row row 1, turn 1: run\(\): its process was killed by SIGKILL \(1 tries\)$"
    ):
        future.result(60)
