"""Environments that fail, engines that fail, what is aborted, and what cannot be loaded."""

import asyncio
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.environments.engine import _by_content
from rlhf.environments.host import Host, Hosts, describe
from rlhf.environments.spec import WorldSpec
from rlhf.episode import Ending, EpisodeRollout
from rlhf.errors import ConfigError, RewardError, WorkerLostError
from rlhf.types import FinishReason, Json
from tests.unit.environments.playing import HERE, TOKENIZER, Make, call, says
from tests.unit.environments.support import ScriptedEngine, make_prompt, make_request

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("place", ["reset", "step", "reward"])
@pytest.mark.parametrize("kind", ["raises", "hangs", "dies"])
def test_an_environment_that_fails_loses_its_own_response(play: Make, kind: str, place: str) -> None:
    game = play(says("a"), environment="Troubled", timeout_s=0.7).row(fails=f"{kind} in {place}")
    rollout = game.once()
    said = {
        "raises": "raised RuntimeError: broken",
        "hangs": "took over 0.7 s",
        "dies": "its process exited with code 3",
    }
    assert rollout.episode.ending is Ending.FAILED
    assert rollout.finish_reason is FinishReason.ABORTED
    turn = 0 if place == "reset" else 1
    assert rollout.episode.failure.startswith(f"{HERE}Troubled: row row 1, turn {turn}: {place}()")
    assert said[kind] in rollout.episode.failure
    assert rollout.episode.num_retries == 1
    assert [repair.text.rpartition("; ")[2] for repair in game.repairs] == [
        "its episode begins anew",
        "its response is left out",
    ]


def test_an_environment_that_recovers_is_asked_anew(play: Make, tmp_path: Path) -> None:
    game = play(says("a"), environment="Troubled").row(fails="dies in step", once=str(tmp_path / "once"))
    rollout = game.once()
    assert (rollout.episode.ending, rollout.episode.num_retries, rollout.episode.reward) == (Ending.TERMINATED, 1, 2.0)


def test_time_in_an_environment_that_failed_counts(play: Make, tmp_path: Path) -> None:
    game = play(says("a"), environment="Troubled", timeout_s=0.7)
    recovered = game.row(fails="hangs in step", once=str(tmp_path / "once")).once("a").episode
    failed = game.row(fails="hangs in step").once("b").episode
    assert (recovered.ending, failed.ending) == (Ending.TERMINATED, Ending.FAILED)
    assert recovered.world_s >= 0.7
    assert failed.world_s >= 1.4


@pytest.mark.parametrize("kind", ["raises", "hangs", "dies"])
def test_closing_has_no_consequence(play: Make, kind: str) -> None:
    game = play(says("a"), environment="Troubled", timeout_s=0.7).row(fails=f"{kind} in close")
    start = time.monotonic()
    assert game.once().episode.ending is Ending.TERMINATED
    assert time.monotonic() - start < 3


def test_a_failing_environment_can_end_the_run(play: Make) -> None:
    game = play(says("a"), environment="Troubled", on_error="fail").row(fails="raises in step")
    (future,) = game.episodes.submit([make_request(game.prompt)])
    with pytest.raises(RewardError, match=r"Troubled: row row 1, turn 1: step\(\) raised .* \(2 tries\)$"):
        future.result(30)


def test_first_turns_reach_the_engine_in_one_call(play: Make) -> None:
    game = play(says("a"), "add")
    for future in game.episodes.submit([make_request(game.prompt, f"n{n}") for n in range(6)]):
        future.result(10)
    assert game.engine.calls == [6]


def test_an_aborted_episode_ends_with_its_turn(play: Make) -> None:
    game = play(lambda seen, turn: None if turn else call("add", a=1), "add")
    (future,) = game.episodes.submit([make_request(game.prompt, "gone")])
    while len(game.engine.requests) < 2:
        time.sleep(0.01)
    game.episodes.abort(["gone", "unknown"])
    deadline = time.monotonic() + 10
    while not future.cancelled() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert future.cancelled()
    assert game.engine.aborted == ["gone/turn1"]


def test_engines_sleep_once_aborted_episodes_have_ended(play: Make) -> None:
    game = play(lambda seen, turn: None, "add")
    (future,) = game.episodes.submit([make_request(game.prompt, "gone")])
    while not game.engine.requests:
        time.sleep(0.01)
    had_ended: list[bool] = []
    game.engine.sleep = lambda: had_ended.append(future.cancelled())  # type: ignore[method-assign]
    game.episodes._loop.call_soon_threadsafe(time.sleep, 0.3)  # it has other things to do
    game.episodes.abort(["gone"])
    game.episodes.sleep()
    assert had_ended == [True]
    assert game.engine.aborted == ["gone/turn0"]


def test_an_episode_that_is_aborted_before_it_begins_ends(play: Make) -> None:
    game = play(says("a"), "add")
    game.episodes._loop.call_soon_threadsafe(time.sleep, 0.3)
    future = game.submit("gone")
    game.episodes.abort(["gone"])
    with pytest.raises(CancelledError):
        future.result(5)
    assert game.engine.requests == []


def test_an_error_of_the_engine_is_that_of_the_response(play: Make) -> None:
    class Lost(ScriptedEngine):
        def submit(self, requests: object) -> list[object]:  # type: ignore[override]
            raise WorkerLostError("gone")

    game = play(says("a"), "add")
    game.episodes._engine = Lost(TOKENIZER, says("a"))  # type: ignore[assignment]
    (future,) = game.episodes.submit([make_request(game.prompt)])
    with pytest.raises(WorkerLostError, match="gone"):
        future.result(10)


def test_closing_ends_what_is_under_way(play: Make) -> None:
    game = play(lambda seen, turn: None, "add")
    (future,) = game.episodes.submit([make_request(game.prompt)])
    while not game.engine.requests:
        time.sleep(0.01)
    game.episodes.close()
    assert future.cancelled()
    game.episodes.close()


def test_everything_that_is_wrong_with_tools_is_said_at_once() -> None:
    spec = WorldSpec(
        tools=(HERE + "add", "tests.unit.environments.test_tools:no_hint", HERE + "Guess", "nowhere:f", HERE + "gone"),
        environments=(HERE + "add",),
    )
    with pytest.raises(ConfigError) as caught:
        describe(spec)
    assert [line.partition(": ")[2].partition(": ")[2] for line in caught.value.problems] == [
        "a has no type hint.",
        "it is of type type, not a function.",
        "no module nowhere in this folder or on the Python path.",
        "tests.unit.environments.agent_tools has no gone.",
        "",
    ]
    assert caught.value.problems[-1] == f"rollout.environment: {HERE}add is of type function, not a class."


def test_names_that_collide_are_refused() -> None:
    with pytest.raises(ConfigError, match="there is another tool called add"):
        describe(WorldSpec(tools=(HERE + "add", HERE + "add")))


def test_a_game_that_was_cut_before_its_first_step_has_gained_nothing(play: Make) -> None:
    game = play(says("5" * 500), environment="Guess").row(secret=7)
    for limit, num_turns in ((20, 0), (200, 1)):
        episode = game.once(f"{limit}", max_tokens=limit).episode
        assert (episode.ending, episode.num_turns, episode.reward) == (Ending.MAX_TOKENS, num_turns, 0.0)


def test_rows_that_cannot_be_told_apart_are_refused() -> None:
    one = make_prompt(TOKENIZER)
    assert len(_by_content([one, one, make_prompt(TOKENIZER, "Other.")])) == 2
    with pytest.raises(ConfigError, match='two rows have the id "row 1"'):
        _by_content([one, replace(one, label="4")])


def test_calls_that_never_end_do_not_hold_those_that_wait(play: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.environments.host.MAX_LATE", 20)
    game = play(says("a"), environment="Troubled", timeout_s=1.5, num_retries=0)
    stuck = game.row(fails="hangs in step").episodes.submit([make_request(game.prompt, f"s{n}") for n in range(70)])
    rollouts = [future.result(50) for future in stuck]
    assert all(isinstance(one, EpisodeRollout) and one.episode.ending is Ending.FAILED for one in rollouts)


def test_aborted_calls_do_not_hold_those_that_wait(play: Make) -> None:
    game = play(says("a"), environment="Troubled", timeout_s=2.0).row(fails="hangs in step")
    names = [f"s{n}" for n in range(64)]
    game.episodes.submit([make_request(game.prompt, name) for name in names])
    while len(game.engine.requests) < len(names):
        time.sleep(0.05)
    time.sleep(0.5)
    game.episodes.abort(names)
    episode = game.row(fails="never").once("next").episode
    assert (episode.ending, episode.reward) == (Ending.TERMINATED, 2.0)


def test_an_environment_that_is_aborted_while_it_is_built_is_closed(play: Make, tmp_path: Path) -> None:
    game = play(says("a"), environment="Slow").row(note=str(tmp_path / "warm"))
    game.once("warm")
    note = tmp_path / "note"
    game.row(note=str(note))
    future = game.submit("gone")
    time.sleep(0.4)
    game.episodes.abort(["gone"])
    deadline = time.monotonic() + 10
    while not (note.exists() and note.read_text() == "opened closed ") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert future.cancelled()
    assert note.read_text() == "opened closed "


def test_a_tool_whose_process_cannot_start_again_is_an_observation(
    play: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRAIL_TOOL", str(tmp_path / "busy"))
    game = play(says(call("die_for_good"), "done"), "frail_tool:die_for_good", max_tool_response_tokens=400)
    episode = game.once().episode
    assert (episode.ending, episode.num_failed_calls) == (Ending.ANSWER, 1)
    said = episode.messages[1].content
    assert said.startswith("error: no process for die_for_good can start: rollout.tools.0: ")
    assert said.endswith("raises ImportError: device busy.")


def test_a_process_that_many_shared_does_not_become_one_for_each(play: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.environments.host.MAX_OWN", 2)
    game = play(says("a"), environment="Troubled").row(fails="dies in step")
    hosts: Hosts = game.episodes._sessions._hosts  # type: ignore[attr-defined]
    start, starting, most = Host.start, 0, 0

    async def counted(spec: WorldSpec) -> Host:
        nonlocal starting, most
        starting += 1
        most = max(most, starting + len(hosts._own))
        try:
            return await start(spec)
        finally:
            starting -= 1

    monkeypatch.setattr(Host, "start", counted)
    futures = game.episodes.submit([make_request(game.prompt, f"n{n}") for n in range(6)])
    rollouts = [future.result(50) for future in futures]
    assert all(isinstance(one, EpisodeRollout) and one.episode.num_retries == 1 for one in rollouts)
    assert most <= 3, "two that begin anew, and one that is shared"


def test_many_episodes_need_no_thread_each(play: Make) -> None:
    game = play(lambda seen, turn: "done" if turn == 2 else call("add", a=turn), "add")
    game.once("warm")
    before = threading.active_count()
    futures = game.episodes.submit([make_request(game.prompt, f"n{n}") for n in range(300)])
    assert threading.active_count() <= before + 1
    assert all(future.result(50).finish_reason is FinishReason.STOP for future in futures)
    assert threading.active_count() <= before + 1


def test_memory_is_limited() -> None:
    async def ask() -> list[str]:
        host = await Host.start(WorldSpec(tools=(HERE + "flood",), memory_gib=1.5))
        requests: list[dict[str, Json]] = [
            {"op": "call", "name": "flood", "arguments": {"size": size}} for size in (3_000_000_000, 10)
        ]
        replies = [await host.ask({"episode": "e", **request}, 20.0) for request in requests]
        await host.close()
        return [str(reply.get("raised", reply.get("text"))) for reply in replies]

    assert asyncio.run(ask()) == ["MemoryError", "x" * 10]
