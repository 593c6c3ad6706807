"""Episodes with real processes of tools and environments, and an engine that follows a script."""

import threading
import time
from itertools import pairwise

import numpy as np
import pytest

from rlhf.episode import Ending, EpisodeRollout
from rlhf.types import FinishReason
from tests.unit.environments.playing import TOKENIZER, Make, call, says
from tests.unit.environments.support import FORGETFUL, byte_tokenizer, make_request

pytestmark = pytest.mark.timeout(60)


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
        (call("add", a="\ud83d"), "error: the call holds a lone surrogate at character 0"),
        (call("\ud83d"), "error: the call holds a lone surrogate at character 0"),
        (call("\ud83d", a=1).replace('{"a": 1}', "1"), "error: the arguments of ? are no JSON object"),
        (call("add", a="\x00"), "error: the call holds a NUL byte"),
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
    assert game.described.worlds[0].tool_names == ("done", "put")
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


def test_a_game_whose_template_drops_thoughts_goes_on_in_segments(play: Make) -> None:
    """Each turn is in the context in which it was sampled: the engine was asked with exactly these tokens."""
    turns = ("<think>middle</think>5", "<think>more</think>8", "7")
    game = play(says(*turns), environment="Guess", tokenizer=byte_tokenizer(FORGETFUL), max_tokens=2000).row(secret=7)
    rollout = game.once()
    assert (rollout.episode.ending, rollout.episode.num_segments) == (Ending.TERMINATED, 3)
    assert [said.content for said in rollout.episode.messages if said.role == "assistant"] == list(turns)
    ids = np.concatenate([game.prompt.token_ids, rollout.token_ids])
    bounds = [0, *(len(game.prompt.token_ids) + start for start in rollout.segment_starts), len(ids)]
    for request, (start, end), turn in zip(game.engine.requests, pairwise(bounds), turns, strict=True):
        context, asked = ids[start:end].tolist(), request.prompt_token_ids.tolist()
        assert context[: len(asked)] == asked
        assert game.tokenizer.decode(context[len(asked) :], skip_special_tokens=False) == f"{turn}<|im_end|>"
    assert rollout.loss_mask is not None
    own = game.tokenizer.decode(rollout.token_ids[rollout.loss_mask].tolist(), skip_special_tokens=False)
    assert own == "".join(f"{turn}<|im_end|>" for turn in turns)


def test_segments_end_where_learning_has_no_room_for_more(play: Make) -> None:
    forgetful = byte_tokenizer(FORGETFUL)

    def forever(seen: str, turn: int) -> str:
        return "<think>hm</think>0"

    seen = []
    for most in (100, 800, 1600):
        game = play(forever, environment="Guess", tokenizer=forgetful, max_turns=50, max_tokens=most).row(secret=7)
        rollout = game.once(max_tokens=300)
        assert rollout.episode.ending in (Ending.SEALED, Ending.MAX_TOKENS)
        assert rollout.finish_reason is FinishReason.LENGTH
        size = len(rollout.token_ids) + len(game.prompt.token_ids)
        assert size <= max(most, 300 + len(game.prompt.token_ids))
        assert rollout.loss_mask is None or rollout.loss_mask[-1]
        seen.append(rollout.episode.num_segments)
    assert seen == sorted(set(seen))
