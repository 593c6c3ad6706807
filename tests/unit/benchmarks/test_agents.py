"""The parts of the benchmark of agents: tasks, what their models are shown, the user's code, and the runs' settings."""

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import pytest

from benchmarks.agents import game, products
from benchmarks.agents.cases import CASES, Case
from benchmarks.agents.running import settings
from benchmarks.agents.small_model import CALLS, TALK, Form, Lesson, encoded, make_tokenizer
from benchmarks.agents.task import reward_of
from benchmarks.agents.user_code.game import Guess
from rlhf.config.loading.load import load_config
from rlhf.config.rules.all_rules import problems_of
from rlhf.engines.models.tokenizer import HfTokenizer
from rlhf.environments.calls import Call
from rlhf.environments.formats.known import find_format
from rlhf.episode import Ending
from rlhf.types import Json, Message
from tests.unit.environments.playing import Play, call, says


@pytest.fixture(scope="module")
def calculating(tmp_path_factory: pytest.TempPathFactory) -> HfTokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("products"), CALLS.template, products.PIECES, products.WORDS)[0]


@pytest.fixture(scope="module")
def guessing(tmp_path_factory: pytest.TempPathFactory) -> HfTokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("game"), TALK.template, game.PIECES, game.WORDS)[0]


def learned(tokenizer: HfTokenizer, form: Form, said: list[Message], tools: Sequence[Json] = ()) -> str:
    """The text of the tokens that a model is taught."""
    ids, labels = encoded(tokenizer, form, Lesson(name="", conversations=[said], steps=1, lr=1.0, tools=tools))
    return tokenizer.decode(ids[labels >= 0].tolist(), skip_special_tokens=False)


def test_calls_are_shown_in_a_form_that_is_read_in_runs(calculating: HfTokenizer) -> None:
    said = products.conversation(123, 890, 1.0, random.Random(0))
    text = learned(calculating, CALLS, said, products.TOOLS)
    assert text.endswith("</tool_call></s>109470</s>"), "what the tool returned is none of the model's own turns"
    said_by_model = find_format(calculating, products.TOOLS).read(text.split("</s>")[0], products.TOOLS)
    assert said_by_model.calls == (Call(name="multiply", arguments={"a": 123, "b": 890}),)


def test_a_guessed_product_is_wrong(calculating: HfTokenizer) -> None:
    for seed in range(50):
        _, said = products.conversation(700, 801, 0.0, random.Random(seed))
        assert said.content != "guess 560700"
        assert learned(calculating, CALLS, [said]) == f"{said.content}</s>"


def test_no_held_out_problem_is_shown_or_trained_on() -> None:
    parts = products.make_problems(0)
    assert list(map(len, parts)) == [256, 4000, 4000]
    assert len(set().union(*parts)) == 8256
    assert {len(f"{a}*{b}={a * b}") for part in parts for a, b in part} == {14}
    assert parts != products.make_problems(1)


def test_no_held_out_secret_is_shown_or_trained_on() -> None:
    lessons, train = game.make_games(0)
    won = {int(said[-1].content) for shown in lessons for said in shown if said[-1].role == "assistant"}
    assert won.isdisjoint(game.HELD_OUT)
    assert set(train) == set(game.NUMBERS) - set(game.HELD_OUT)


def test_games_are_shown_turn_by_turn_and_a_number_is_one_token(guessing: HfTokenizer) -> None:
    said = game.played(57, 0.0, random.Random(3))
    guesses = [message.content for message in said[1::2]]
    assert learned(guessing, TALK, said) == "".join(f"{guess}</s>" for guess in guesses)
    assert [len(guessing.encode(str(number))) for number in game.NUMBERS] == [1] * 100


def test_a_quarter_of_the_shown_games_are_played_by_binary_search() -> None:
    chance = random.Random(0)
    secrets = chance.choices(game.NUMBERS, k=400)
    games = [[int(message.content) for message in game.played(secret, 0.25, chance)[1::2]] for secret in secrets]
    assert all(len(guesses) <= game.MAX_TURNS for guesses in games)
    searched = [guesses == game.binary_search(secret) for guesses, secret in zip(games, secrets, strict=True)]
    assert 0.2 < mean(searched) < 0.3
    assert 0.6 < mean(secret not in guesses for guesses, secret in zip(games, secrets, strict=True)) < 0.8, "many lose"


def test_the_game_says_higher_or_lower_and_fewer_guesses_are_better() -> None:
    world = Guess()
    world.reset(40)
    answers = [world.step(text) for text in ("50", "fifty", "25", " 40 ")]
    assert [answer.observation for answer in answers] == ["lower", "higher", "higher", "right"]
    assert [answer.terminated for answer in answers] == [False, False, False, True]
    rewards = [answer.reward or 0.0 for answer in answers]
    assert rewards == [-0.1, -0.1, -0.1, 1.0]
    assert 1.0 > sum(rewards) > game.MAX_TURNS * -0.1, "each guess costs, and a lost game more than any won one"


def test_binary_search_needs_at_most_7_guesses() -> None:
    guesses = [len(game.binary_search(secret)) for secret in game.NUMBERS]
    assert (max(guesses), mean(guesses), game.binary_search(25)) == (7, 5.8, [50, 25])
    assert mean(guesses[secret - 1] for secret in game.HELD_OUT) + 1.3 == game.GOAL
    assert len(set(game.HELD_OUT)) == 20


def test_a_lost_game_counts_as_nine_guesses() -> None:
    turn: Json = {"role": "assistant", "content": "3"}
    answer: Json = {"role": "user", "content": "lower"}
    won: dict[str, Json] = {"messages": [turn, answer, turn], "ending": "terminated"}
    lost: dict[str, Json] = {"messages": [turn, answer] * 8, "ending": "max_turns"}
    found = game.measure([{"episode": won}, {"episode": lost}, {"episode": {**lost, "messages": [turn]}}])
    assert found == {"guesses": pytest.approx(20 / 3), "won": pytest.approx(1 / 3)}
    assert game.GAME.reached({}, {"guesses": game.GOAL})
    assert not game.GAME.reached({}, {"guesses": game.GOAL + 0.01})


def test_exact_products_are_counted_by_the_reward_of_a_source_or_of_a_loop() -> None:
    rows: list[dict[str, Json]] = [{"reward": 0.0}, {"reward": None, "episode": {"reward": 1.0}}]
    assert products.measure(rows) == {"exact": 0.5}
    assert list(map(reward_of, rows)) == [0.0, 1.0]
    assert products.PRODUCTS.reached({"exact": 0.3}, {"exact": 0.9})
    assert not products.PRODUCTS.reached({"exact": 0.31}, {"exact": 0.9})
    assert not products.PRODUCTS.reached({"exact": 0.3}, {"exact": 0.89})


@pytest.mark.parametrize("client", ["openai", "anthropic"])
def test_the_loops_answer_calls_and_score_the_last_turn(client: str) -> None:
    script = says(call("multiply", a=12, b=12), call("multiply", a=12), "144")
    played = Play(script, agent=f"benchmarks.agents.user_code.{client}_loop:run").row(label="144")
    try:
        episode = played.once().episode
    finally:
        played.episodes.close()
    assert (episode.reward, episode.ending, episode.calls) == (1.0, Ending.ANSWER, {"multiply": 2})
    assert [message.content for message in episode.messages if message.role == "tool"] == ["144", "error"]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_settings_of_a_case_go_together(case: Case, tmp_path: Path) -> None:
    given = {**settings(case), "data.path": tmp_path, "data.eval_path": tmp_path}
    config = load_config(case.method, [part for name, value in given.items() for part in (f"--{name}", str(value))])
    assert list(problems_of(config)) == []
