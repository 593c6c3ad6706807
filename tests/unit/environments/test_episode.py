"""Episodes with real processes of tools and environments, and an engine that follows a script."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf.environments.calls import find_parser, no_calls
from rlhf.environments.engine import EpisodeEngine, FaultPolicy, _by_content
from rlhf.environments.episode import EpisodeLimits, Rules
from rlhf.environments.host import describe
from rlhf.environments.spec import WorldSpec
from rlhf.episode import Ending, EpisodeRollout
from rlhf.errors import ConfigError, RewardError, WorkerLostError
from rlhf.types import FinishReason, Json, Repair, Rollout
from tests.unit.environments.support import Script, ScriptedEngine, byte_tokenizer, make_prompt, make_request

pytestmark = pytest.mark.timeout(60)

HERE = "tests.unit.environments.agent_tools:"
TOKENIZER = byte_tokenizer()


def call(name: str, **arguments: Json) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Play:
    """Plays episodes with tools and an environment."""

    def __init__(self, script: Script, *tools: str, environment: str | None = None, **settings: object) -> None:
        named = tuple(HERE + name for name in tools)
        self.spec = WorldSpec(tools=named, environment=None if environment is None else HERE + environment)
        self.described = describe(self.spec)
        self.prompt = make_prompt(TOKENIZER, tools=self.described.tools, is_open=environment is not None)
        self.engine = ScriptedEngine(TOKENIZER, script)
        self.repairs: list[Repair] = []
        limits = {"max_turns": 4, "max_turn_tokens": None, "max_tool_response_tokens": 40}
        faults = {"timeout_s": 10.0, "num_retries": 1, "on_error": "drop"}
        self.episodes = EpisodeEngine(
            self.engine,
            self.spec,
            Rules(
                tokenizer=TOKENIZER,
                described=self.described,
                parser=find_parser(TOKENIZER, self.described.tools) if self.described.tools else no_calls,
                limits=EpisodeLimits(**{name: settings.get(name, value) for name, value in limits.items()}),  # type: ignore[arg-type]
            ),
            FaultPolicy(**{name: settings.get(name, value) for name, value in faults.items()}),  # type: ignore[arg-type]
            [self.prompt],
            num_processes=1,
            repaired=self.repairs.append,
        )

    def row(self, **columns: Json) -> "Play":
        """The same prompt with other columns."""
        given = make_prompt(TOKENIZER, tools=self.described.tools, is_open=True)
        self.prompt = replace(given, metadata={**given.metadata, **columns})
        self.episodes._prompts = _by_content([self.prompt])
        return self

    def once(self, name: str = "1/row 1/0", *, max_tokens: int = 4000) -> EpisodeRollout:
        (future,) = self.episodes.submit([make_request(self.prompt, name, max_tokens=max_tokens)])
        rollout = future.result(50)
        assert isinstance(rollout, EpisodeRollout)
        return rollout

    def text(self, rollout: Rollout) -> str:
        return TOKENIZER.decode(rollout.token_ids.tolist(), skip_special_tokens=False)


Make = Callable[..., Play]


@pytest.fixture
def play() -> Iterator[Make]:
    opened: list[Play] = []

    def make(script: Script, *tools: str, environment: str | None = None, **settings: object) -> Play:
        opened.append(Play(script, *tools, environment=environment, **settings))
        return opened[-1]

    yield make
    for one in opened:
        one.episodes.close()


def says(*turns: str) -> Script:
    return lambda seen, turn: turns[turn]


def test_a_tool_is_called_and_its_tokens_are_masked(play: Make) -> None:
    rollout = play(says(call("add", a=2, b=3), "It is 5."), "add").once()
    assert rollout.finish_reason is FinishReason.STOP
    assert rollout.episode.ending is Ending.ANSWER
    assert rollout.episode.answer == "It is 5."
    assert [(said.role, said.content) for said in rollout.episode.messages][1] == ("tool", "5")
    assert rollout.loss_mask is not None
    own = TOKENIZER.decode(rollout.token_ids[rollout.loss_mask].tolist(), skip_special_tokens=False)
    assert own == f"{call('add', a=2, b=3)}<|im_end|>It is 5.<|im_end|>"
    world = TOKENIZER.decode(rollout.token_ids[~rollout.loss_mask].tolist(), skip_special_tokens=False)
    assert world == ("\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert np.array_equal(rollout.log_probs, np.where(rollout.loss_mask, -0.5, 0.0).astype(np.float32))
    assert (rollout.weight_version, rollout.episode.calls, rollout.episode.num_failed_calls) == (3, {"add": 1}, 0)


def test_a_response_without_a_call_is_the_engines_own(play: Make) -> None:
    game = play(says("Hello."), "add")
    rollout = game.once()
    (asked,) = game.engine.requests
    given = make_request(game.prompt)
    assert (asked.seed, asked.sampling) == (given.seed, given.sampling)
    assert np.array_equal(asked.prompt_token_ids, given.prompt_token_ids)
    assert rollout.loss_mask is None
    assert game.text(rollout) == "Hello.<|im_end|>"


def test_later_turns_have_seeds_of_their_own_that_depend_on_nothing_else(play: Make) -> None:
    game = play(says(call("add", a=1), call("add", a=2), "3"), "add")
    game.once("a")
    game.once("b")
    first, second = game.engine.requests[:3], game.engine.requests[3:]
    assert [one.seed for one in first] == [one.seed for one in second]
    assert len({one.seed for one in first}) == 3
    assert [one.id for one in first] == ["a/turn0", "a/turn1", "a/turn2"]


def test_several_calls_of_a_turn_are_made_in_order(play: Make) -> None:
    rollout = play(says(call("add", a=2, b=3) + call("double", number=4), "done"), "add", "double").once()
    assert [said.content for said in rollout.episode.messages if said.role == "tool"] == ["5", "8.0"]
    assert rollout.episode.calls == {"add": 1, "double": 1}
    assert rollout.episode.reward == 0.5


@pytest.mark.parametrize(
    ("turn", "reply"),
    [
        (call("add", a="x"), "error: arguments of add: a: Input should be a valid integer"),
        (call("sub", a=1), "error: there is no tool sub; there are add, leave, die"),
        ("<tool_call>add(1)</tool_call>", "error: the call is no JSON"),
        (call("leave"), "error: RuntimeError: SystemExit: 2"),
        (call("die"), "error: the process of die exited with code 3"),
    ],
)
def test_a_call_that_fails_is_an_observation(play: Make, turn: str, reply: str) -> None:
    rollout = play(says(turn, "I see."), "add", "leave", "die", max_tool_response_tokens=100).once()
    assert rollout.episode.messages[1].content.startswith(reply)
    assert (rollout.episode.num_calls, rollout.episode.num_failed_calls) == (1, 1)
    assert rollout.episode.ending is Ending.ANSWER


def test_a_tool_that_takes_too_long_holds_nobody(play: Make) -> None:
    game = play(lambda seen, turn: "over" if turn else call("wait", seconds=30), "wait", "add", timeout_s=0.5)
    start = time.monotonic()
    rollout = game.once()
    assert rollout.episode.messages[1].content == "error: wait took over 0.5 s"
    assert time.monotonic() - start < 5
    again = game.once("2")
    assert again.episode.messages[1].content == "error: wait took over 0.5 s", "in a new process"


def test_one_call_that_lets_no_other_run_is_found(play: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.environments.host.PING_TIMEOUT_S", 0.5)
    stuck = threading.Event()

    def script(seen: str, turn: int) -> str:
        return "over" if turn else call("stop_all", seconds=3) if stuck.is_set() else call("add", a=1)

    game = play(script, "stop_all", "add", timeout_s=1.0)
    game.once("warm")
    stuck.set()
    first = game.episodes.submit([make_request(game.prompt, "stuck")])
    time.sleep(0.3)
    stuck.clear()
    others = game.episodes.submit([make_request(game.prompt, f"other {n}") for n in range(5)])
    for future in others:
        rollout = future.result(30)
        assert isinstance(rollout, EpisodeRollout)
        assert rollout.episode.messages[1].content == "2", "others are asked again, and are right"
    rollout = first[0].result(30)
    assert isinstance(rollout, EpisodeRollout)
    assert rollout.episode.num_failed_calls == 1


def test_a_flood_is_cut_in_the_middle_and_says_so(play: Make) -> None:
    rollout = play(says(call("flood", size=50_000_000), "long"), "flood").once()
    (said,) = [said.content for said in rollout.episode.messages if said.role == "tool"]
    assert said.startswith("x" * 20 + "\n[")
    assert said.endswith(" tokens left out]\n" + "x" * 20)


def test_control_tokens_of_a_tool_end_nothing(play: Make) -> None:
    rollout = play(says(call("special", text="hi"), "ok"), "special").once()
    assert rollout.episode.messages[1].content == "hi< |im_end|>"
    assert rollout.episode.num_turns == 2


def test_turns_and_tokens_are_limited(play: Make) -> None:
    forever = play(lambda seen, turn: call("add", a=turn), "add", max_turns=3)
    rollout = forever.once()
    assert (rollout.episode.ending, rollout.finish_reason) == (Ending.MAX_TURNS, FinishReason.LENGTH)
    assert (rollout.episode.num_turns, rollout.episode.calls) == (3, {"add": 3})
    assert rollout.loss_mask is not None
    assert rollout.loss_mask[-1], "it ends with what the model wrote"
    whole = len(rollout.token_ids)
    for limit in (whole - 1, whole // 2, 80, 20, 1):
        rollout = forever.once(f"limit {limit}", max_tokens=limit)
        assert rollout.episode.ending is Ending.MAX_TOKENS
        assert rollout.finish_reason is FinishReason.LENGTH
        assert len(rollout.token_ids) <= limit
        assert rollout.loss_mask is None or rollout.loss_mask[-1]


def test_a_turn_may_have_a_limit_of_its_own(play: Make) -> None:
    game = play(says("x" * 100), "add", max_turn_tokens=30)
    rollout = game.once()
    assert (len(rollout.token_ids), rollout.episode.ending) == (30, Ending.MAX_TOKENS)


def test_a_game_steps_with_each_turn(play: Make) -> None:
    game = play(says("5", "8", "7"), environment="Guess").row(secret=7)
    rollout = game.once()
    roles = [(said.role, said.content) for said in rollout.episode.messages]
    assert roles == [
        ("user", "I think of a number from 0 to 10."),
        ("assistant", "5"),
        ("user", "higher"),
        ("assistant", "8"),
        ("user", "lower"),
        ("assistant", "7"),
    ]
    assert rollout.episode.ending is Ending.TERMINATED
    assert rollout.finish_reason is FinishReason.STOP
    assert rollout.episode.reward == pytest.approx(0.8)
    assert rollout.episode.parts == {"distance": 0.0}
    assert game.text(rollout).startswith("<|im_start|>user\nI think of a number")
    assert rollout.loss_mask is not None
    assert not rollout.loss_mask[0]
    assert rollout.episode.num_world_tokens == int((~rollout.loss_mask).sum())


def test_the_methods_of_an_environment_are_tools(play: Make) -> None:
    game = play(says(call("put", what="book"), call("put", what="stone"), call("done")), environment="Shelf")
    assert game.described.tool_names == ("done", "put")
    rollout = game.once()
    assert [said.content for said in rollout.episode.messages if said.role == "tool"] == [
        "1 kept",
        "error: ValueError: too heavy",
    ]
    assert rollout.episode.ending is Ending.TERMINATED
    assert rollout.episode.reward == 1.0, "by reward()"


def test_each_response_has_an_environment_of_its_own(play: Make) -> None:
    game = play(says(call("put", what="book"), "over"), environment="Shelf")
    futures = game.episodes.submit([make_request(game.prompt, f"n{n}") for n in range(20)])
    rollouts = [future.result(30) for future in futures]
    assert all(isinstance(one, EpisodeRollout) and one.episode.reward == 1.0 for one in rollouts)


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
        environment=HERE + "add",
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


def test_many_episodes_need_no_thread_each(play: Make) -> None:
    game = play(lambda seen, turn: "done" if turn == 2 else call("add", a=turn), "add")
    game.once("warm")
    before = threading.active_count()
    futures = game.episodes.submit([make_request(game.prompt, f"n{n}") for n in range(300)])
    assert threading.active_count() <= before + 1
    assert all(future.result(50).finish_reason is FinishReason.STOP for future in futures)
    assert threading.active_count() <= before + 1
