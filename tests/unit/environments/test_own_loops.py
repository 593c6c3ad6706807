"""Users' own loops: any client's requests become a response with exact tokens."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import replace

import httpx
import numpy as np
import pytest

from rlhf.conversations.messages import as_json
from rlhf.environments.engine import _by_content
from rlhf.environments.host import describe
from rlhf.environments.spec import WorldSpec
from rlhf.episode import Ending, EpisodeRollout
from rlhf.errors import ConfigError
from rlhf.types import FinishReason, Json, Message
from tests.unit.environments.playing import TOKENIZER, Play, call, says
from tests.unit.environments.support import Script
from tests.unit.environments.test_transcript import contexts_of

pytestmark = pytest.mark.timeout(120)
LOOPS = "tests.unit.environments.own_loops:"
GO = "<|im_start|>user\nGo.<|im_end|>\n<|im_start|>assistant\n"
Make = Callable[..., Play]


@pytest.fixture
def loop() -> Iterator[Make]:
    opened: list[Play] = []

    def make(name: str, script: Script, **settings: object) -> Play:
        opened.append(Play(script, agent=LOOPS + name, **settings))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for one in opened:
        one.episodes.close()


def own_text(rollout: EpisodeRollout) -> str:
    mask = np.ones(len(rollout.token_ids), dtype=bool) if rollout.loss_mask is None else rollout.loss_mask
    return TOKENIZER.decode(rollout.token_ids[mask].tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("name", ["calculates", "calculates_with_anthropic"])
def test_stock_clients_work_unchanged(loop: Make, name: str) -> None:
    """The tokens are those that tools of ours would give, but for a prompt with the caller's own tools."""
    game = loop(name, says(call("add", a=2, b=3), "It is 5."))
    rollout = game.once()
    assert (rollout.episode.reward, rollout.episode.ending) == (1.0, Ending.ANSWER)
    assert (rollout.episode.num_turns, rollout.episode.calls) == (2, {"add": 1})
    assert own_text(rollout) == f"{call('add', a=2, b=3)}<|im_end|>It is 5.<|im_end|>"
    row, segment = contexts_of(rollout, game.prompt)
    assert row == GO, "nothing is learned from the row's own prompt, which has no tools"
    turn = f"[{call('add', a=2, b=3)}<|im_end|>]\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n"
    assert segment.endswith(f"{GO}{turn}<|im_start|>assistant\n[It is 5.<|im_end|>]")
    assert '"name": "add"' in segment
    shown = TOKENIZER.decode(rollout.token_ids[rollout.first :].tolist(), skip_special_tokens=False)
    assert shown.startswith(call("add", a=2, b=3)), "the text of a response begins with what the policy said"


@pytest.mark.parametrize("name", ["calculates", "calculates_with_anthropic"])
def test_a_call_without_a_name_is_text_which_clients_can_send_back(loop: Make, name: str) -> None:
    """They refuse nothing of the kind, and would be refused themselves with the next turn."""
    rollout = loop(name, says(call("", a=2, b=3))).once()
    assert (rollout.episode.ending, rollout.episode.num_turns, rollout.episode.calls) == (Ending.ANSWER, 1, {})
    assert rollout.episode.num_retries == 0


def test_a_proxy_is_not_asked_for_this_machine(loop: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.org")
    assert loop("calculates", says("It is 5."), num_retries=0).once().episode.reward == 1.0


def test_what_the_caller_changes_is_another_segment(loop: Make) -> None:
    """Each is a context in which its turns were sampled; one that was left may be continued again."""
    game = loop("edits_its_history", says("a", "b", "c", "d"))
    rollout = game.once()
    assert rollout.episode.num_segments == 2
    on = "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert contexts_of(rollout, game.prompt) == [
        f"{GO}[a<|im_end|>]{on.format('on')}[b<|im_end|>]{on.format('and on')}[d<|im_end|>]",
        f"{GO}something else<|im_end|>{on.format('on')}[c<|im_end|>]",
    ]
    asked = [request.prompt_token_ids.tolist() for request in game.engine.requests]
    ids = np.concatenate([game.prompt.token_ids, rollout.token_ids]).tolist()
    cut = len(game.prompt.token_ids) + rollout.segment_starts[0]
    for request, segment in ((0, ids[:cut]), (1, ids[:cut]), (2, ids[cut:]), (3, ids[:cut])):
        assert segment[: len(asked[request])] == asked[request], "the engine read what is trained on"


def test_two_requests_at_the_same_time_are_two_conversations(loop: Make) -> None:
    game = loop("asks_two_at_once", says("a", "b", "c", "d"))
    rollout = game.once()
    assert rollout.episode.num_segments == 2
    first, second = contexts_of(rollout, game.prompt)
    assert ("a" in first, "b" in second) == (True, True)
    assert sorted(text[-12:] for text in (first, second)) == ["[c<|im_end|>]"[-12:], "[d<|im_end|>]"[-12:]]
    assert len({request.seed for request in game.engine.requests}) == 4


@pytest.mark.parametrize(("limits", "at_once"), [({}, 1), ({"max_turn_tokens": 60}, 2)])
def test_requests_at_the_same_time_have_room_together(loop: Make, limits: dict[str, int], at_once: int) -> None:
    """One that could exceed it with those under way waits for them."""
    game = loop("asks_two_at_once", lambda seen, turn: None, context=300, max_tokens=500, **limits)
    future = game.submit()
    deadline = time.monotonic() + 60
    while len(game.engine.requests) < at_once:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.0)  # a further one would be there by now
    assert len(game.engine.requests) == at_once
    asked = game.engine.requests
    assert sum(len(one.prompt_token_ids) + one.sampling.max_tokens for one in asked) <= 500
    game.engine.script = lambda seen, turn: "12345"
    game.engine.answer_waiting()
    rollout = future.result(30)
    assert isinstance(rollout, EpisodeRollout)
    assert (rollout.episode.num_turns, rollout.episode.reward) == (4, 1.0), "none was refused"
    assert len(rollout.token_ids) <= 500


def test_the_answer_is_the_turn_that_was_last(loop: Make) -> None:
    episode = loop("asks_a_sub_agent", says("plan", "found", "done")).once().episode
    assert (episode.num_segments, episode.answer) == (2, "done")
    assert [said.content for said in episode.messages] == ["plan", "found", "done"]


def test_the_answer_is_read_from_a_prompt_that_is_shorter_than_the_rows(loop: Make) -> None:
    game = loop("says_nothing_of_it", says("done"))
    given = [Message(role="system", content="Be brief."), Message(role="user", content="Go.")]
    text = TOKENIZER.render(given, add_generation_prompt=True)
    messages: list[Json] = [as_json(message) for message in given]
    game.prompt = replace(
        game.prompt, text=text, token_ids=np.array(TOKENIZER.encode(text)), metadata={"messages": messages}
    )
    game.episodes._prompts = _by_content([game.prompt])
    episode = game.once().episode
    assert (episode.num_segments, episode.answer) == (2, "done")
    assert [said.content for said in episode.messages] == ["Go.", "done"]


def test_turns_of_another_temperature_are_read_and_not_learned_from(loop: Make) -> None:
    game = loop("cools_down", says("cold", "warm"))
    rollout = game.once()
    assert [request.sampling.temperature for request in game.engine.requests] == [0.0, 1.0]
    assert game.engine.requests[0].sampling.max_tokens == 50
    assert own_text(rollout) == "warm<|im_end|>"
    assert (rollout.episode.reward, rollout.episode.parts) == (0.5, {"asked": 2.0})
    assert (rollout.episode.ending, rollout.finish_reason) == (Ending.TERMINATED, FinishReason.STOP)


def test_turns_and_tokens_are_limited_and_what_was_said_is_kept(loop: Make) -> None:
    game = loop("never_stops", lambda seen, turn: f"turn {turn}", max_turns=3, max_tokens=4000)
    rollout = game.once()
    assert (rollout.episode.ending, rollout.finish_reason) == (Ending.MAX_TURNS, FinishReason.LENGTH)
    assert (rollout.episode.num_turns, rollout.episode.reward) == (3, 0.0)
    for limit in (40, 100, 200):
        game = loop("catches_the_limit", lambda seen, turn: "12345", max_turns=100, context=limit)
        rollout = game.once()
        assert (rollout.episode.ending, rollout.finish_reason) == (Ending.MAX_TOKENS, FinishReason.LENGTH)
        assert rollout.episode.reward == 0.25, "it caught the refusal"
        assert len(rollout.token_ids) <= limit
        assert rollout.loss_mask is None or rollout.loss_mask[-1]


def test_a_refusal_is_no_end_where_the_loop_goes_on(loop: Make) -> None:
    rollout = loop("begins_anew_where_it_is_refused", says("a"), context=400).once()
    assert (rollout.episode.ending, rollout.finish_reason) == (Ending.ANSWER, FinishReason.STOP)
    assert (rollout.episode.reward, rollout.episode.num_segments) == (1.0, 1)


def test_special_tokens_of_the_caller_end_no_turn_and_no_segment(loop: Make) -> None:
    game = loop("hears_special_tokens", says("x", "y", "z"))
    rollout = game.once()
    (context,) = contexts_of(rollout, game.prompt)
    assert "a< |im_end|>b" in context
    assert context.endswith("[z<|im_end|>]")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("fails", "run() raised ValueError: no way"),
        ("leaves", "run() raised RuntimeError: SystemExit: no way"),
        ("sleeps", "run() asked for nothing and did not end for 1 s"),
        ("dies", "run(): its process exited with code 3"),
        ("blocks", "run(): its process answered none of its calls any more"),
    ],
)
def test_a_loop_that_fails_loses_its_own_episode(
    loop: Make, name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.environments.host.PING_TIMEOUT_S", 0.5)
    game = loop(name, lambda seen, turn: "a", timeout_s=1.0)
    start = time.monotonic()
    rollout = game.once()
    assert rollout.episode.ending is Ending.FAILED
    assert text in rollout.episode.failure
    assert "row row 1, turn " in rollout.episode.failure
    assert len(game.repairs) == 2, "once more, and left out"
    assert time.monotonic() - start < 40


def test_a_loop_that_is_only_refused_ends(loop: Make) -> None:
    rollout = loop("asks_on_where_it_is_refused", lambda seen, turn: "a", max_turns=2, timeout_s=4.0).once()
    assert (rollout.episode.ending, rollout.episode.num_turns) == (Ending.MAX_TURNS, 2)


def test_calls_that_cannot_be_read_count_and_so_does_time_after_the_last_request(loop: Make) -> None:
    episode = loop("calls_and_thinks", says(f"<tool_call>\n{{bad\n</tool_call>{call('add', a=1)}")).once().episode
    assert (episode.num_calls, episode.num_failed_calls, episode.calls) == (2, 2, {})
    assert episode.world_s >= 1.0


def test_an_engine_that_is_slow_is_not_the_loops_fault(loop: Make) -> None:
    game = loop("edits_its_history", lambda seen, turn: None, timeout_s=0.5)
    future = game.submit()
    time.sleep(2.0)
    assert not future.done()
    game.engine.script = says("a", "b", "c", "d")
    game.engine.answer_waiting()
    assert future.result(30).episode.ending is Ending.ANSWER  # type: ignore[attr-defined]


def test_a_client_that_asks_again_gets_the_turn_that_it_asked_for(loop: Make) -> None:
    game = loop("tries_again", lambda seen, turn: None)
    future = game.submit()
    while not game.engine.requests:
        time.sleep(0.05)
    time.sleep(2.0)
    assert len(game.engine.requests) == 1, "it has asked twice by now"
    game.engine.script = says("a", "b")
    game.engine.answer_waiting()
    rollout = future.result(30)
    assert isinstance(rollout, EpisodeRollout)
    assert (rollout.episode.num_turns, rollout.episode.num_segments) == (2, 1)


def test_a_client_that_asks_again_gets_no_turn_that_another_waits_for(loop: Make) -> None:
    game = loop("asks_twice_and_again", lambda seen, turn: None, max_turn_tokens=60)
    future = game.submit()
    deadline = time.monotonic() + 30
    while len(game.engine.requests) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(2.0)
    game.engine.script = says("a", "b")
    game.engine.answer_waiting()
    rollout = future.result(30)
    assert isinstance(rollout, EpisodeRollout)
    assert (rollout.episode.reward, rollout.episode.num_turns) == (1.0, 2)


def test_an_engine_that_fails_ends_the_episode_with_its_error(loop: Make) -> None:
    def broken(seen: str, turn: int) -> str:
        raise ConnectionError("engine lost")

    with pytest.raises(ConnectionError, match="engine lost"):
        loop("edits_its_history", broken).once()


def test_an_aborted_episode_ends_its_turns_and_its_loop(loop: Make) -> None:
    game = loop("edits_its_history", lambda seen, turn: None)
    future = game.submit()
    while not game.engine.requests:
        time.sleep(0.05)
    game.episodes.abort(["1/row 1/0"])
    threading.Event().wait(0.5)
    assert future.cancelled()
    assert game.engine.aborted == ["1/row 1/0/turn0"]


def test_an_episode_that_ends_leaves_no_turn_to_the_engine(loop: Make) -> None:
    """Whether its loop fails or returns. What the engine still gives for a failed try is for no turn of the next."""
    short = iter(["fail", "return"])
    game = loop(
        "leaves_a_request_unanswered",
        lambda seen, turn: None if "Take your time." in seen else next(short),
        max_tokens=1000,
    )
    future = game.submit()
    left: list[str] = []
    future.add_done_callback(lambda _: left.extend(game.engine._waiting))
    rollout = future.result(50)
    assert isinstance(rollout, EpisodeRollout)
    assert not left, "aborted before the response is there"
    assert game.episodes._under_way == {}
    asked = [request.id for request in game.engine.requests]
    assert len(set(asked)) == len(asked) == 4
    assert game.engine.aborted == [asked[0], asked[2]]
    assert (rollout.id, rollout.episode.num_retries, rollout.episode.reward) == ("1/row 1/0", 1, 1.0)
    assert own_text(rollout) == "return<|im_end|>"


def test_a_request_that_is_complete_after_the_episode_asks_for_nothing(loop: Make) -> None:
    game = loop("sleeps", lambda seen, turn: "a")
    future, url = game.started()
    while not game.engine.requests:
        time.sleep(0.05)
    address, body = httpx.URL(url), b'{"messages": [{"role": "user", "content": "late"}]}'
    with socket.create_connection((address.host, address.port), timeout=20) as late:
        head = f"POST {address.path}/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        late.sendall(head.encode() + body[:10])
        time.sleep(0.5)
        game.episodes.abort(["1/row 1/0"])
        wait([future], timeout=20)
        late.sendall(body[10:])
        assert b" 503 " in late.recv(100)
    assert len(game.engine.requests) == 1


@pytest.mark.parametrize("said", [call("add", a="\ud83d"), call("add", a="\x00"), "\n", " ", "a\x00"])
def test_what_the_policy_said_can_be_repeated(loop: Make, said: str) -> None:
    rollout = loop("repeats_what_it_heard", says(said, "done"), num_retries=0).once()
    assert (rollout.episode.ending, rollout.episode.num_turns) == (Ending.ANSWER, 2)
    assert own_text(rollout) == f"{said}<|im_end|>done<|im_end|>"


def test_a_loop_may_leave_the_reward_to_others(loop: Make) -> None:
    rollout = loop("says_nothing_of_it", says("a")).once()
    assert (rollout.episode.reward, rollout.episode.ending) == (0.0, Ending.ANSWER)
    assert rollout.loss_mask is None, "its only request was the row's own prompt"


def test_a_loop_may_return_five_values(loop: Make) -> None:
    episode = loop("returns_what_its_row_says", says("a")).row(returns="five values").once().episode
    assert (episode.reward, episode.ending, episode.parts) == (0.5, Ending.TERMINATED, {"a": 1.0})


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        ("text", "the reward is '1.0', need a finite number"),
        ("nan", "the reward is nan, need a finite number"),
        ("two values", "the reward is (1.0, {'x': 1}), need a finite number"),
        ("five others", "the reward is (1, 2, 3, 4, 5), need a finite number"),
        ("a Result of text", "Result.reward is '1.0', need a finite number"),
    ],
)
def test_what_is_no_reward_is_no_zero(loop: Make, returned: str, text: str) -> None:
    episode = loop("returns_what_its_row_says", says("a"), num_retries=0).row(returns=returned).once().episode
    assert episode.ending is Ending.FAILED
    assert f"run() raised ValueError: {text}" in episode.failure


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"stream": True}, "stream is not supported (got true); leave it out"),
        ({"n": 2}, "n is not supported"),
        ({"tool_choice": "required"}, "tool_choice is not supported"),
        ({"temperature": 3}, "temperature is 3, need a number from 0 to 2"),
        ({"messages": []}, "messages is not a list of messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "holds parts that are not text"),
        ({"messages": [{"role": "nobody", "content": "a"}]}, 'messages[0].role "nobody" unknown.'),
    ],
)
def test_what_is_not_supported_is_refused_in_words(loop: Make, body: dict[str, object], text: str) -> None:
    game = loop("sleeps", lambda seen, turn: "a")
    future, url = game.started()
    reply = httpx.post(f"{url}/chat/completions", json={"messages": [{"role": "user", "content": "x"}], **body})
    assert reply.status_code == 400
    assert text in reply.json()["error"]["message"]
    reply = httpx.post(f"{url}/messages", json={"messages": [{"role": "user", "content": "x"}], "stream": True})
    assert (reply.status_code, reply.json()["type"]) == (400, "error")
    assert httpx.get(f"{url}/models").json()["data"][0]["id"] == "policy"
    assert httpx.post(f"{url}/embeddings", json={}).status_code == 404
    secret = url.split("/")[3]
    other = url.replace(secret, "x" * len(secret))
    assert httpx.post(f"{other}/chat/completions", json={}).status_code == 404, "without the session's secret"
    future.cancel()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("is_sync", "it is a function without async, and not async def run"),
        ("takes_one", "it is called as run(session, row) (too many positional arguments)"),
        ("ADD", "it is of type dict, and not async def run"),
        ("missing", "has no missing"),
    ],
)
def test_what_is_no_loop_is_refused_before_anything_starts(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        describe(WorldSpec(agent=LOOPS + name))
    assert text in str(caught.value)
