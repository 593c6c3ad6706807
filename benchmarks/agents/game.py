"""The task to guess a number from 1 to 100 in few turns.

Each turn says which numbers are still possible. Supervised learning on generated games makes a model that heeds this in
half of its guesses only: these are random possible numbers, the others any random numbers. No game has one of the
held-out secrets.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from benchmarks.agents.small_model import Lesson, make_model
from benchmarks.agents.task import Task, episode_of, write_rows
from benchmarks.agents.user_code.game import NUM_NUMBERS, narrowed, possible
from rlhf.types import Json, Message

NUMBERS = range(1, NUM_NUMBERS + 1)
WORDS = ("right", "user", "assistant", *map(str, range(10, NUM_NUMBERS + 1)))
PIECES = r"\d+|[a-z]+|[\s\S]"
MAX_TURNS = 8
MARGIN = 1.3
"""How many guesses more than binary search needs on average."""
GAMES_OF_EACH = 10
NUM_SHOWN, NUM_PROBLEMS = 4000, 2000
KNOWING_SHARE = 0.5
STEPS, LR = 400, 2e-3


def binary_search(secret: int) -> int:
    """The guesses that binary search needs."""
    low, high, guesses = NUMBERS[0], NUMBERS[-1], 1
    while (guess := (low + high) // 2) != secret:
        low, high = (guess + 1, high) if guess < secret else (low, guess - 1)
        guesses += 1
    return guesses


HELD_OUT = NUMBERS[2::5]
"""Secrets that no model is shown or trained on."""
GOAL = mean(map(binary_search, HELD_OUT)) + MARGIN


def played(secret: int, chance: random.Random) -> list[Message]:
    """A game of which some guesses are not possible."""
    low, high = NUMBERS[0], NUMBERS[-1]
    said = []
    for _ in range(MAX_TURNS):
        guess = chance.randint(low, high) if chance.random() < KNOWING_SHARE else chance.choice(NUMBERS)
        said += [Message(role="user", content=possible(low, high)), Message(role="assistant", content=str(guess))]
        if guess == secret:
            break
        low, high = narrowed(low, high, guess, secret)
    return said


def make_games(seed: int) -> tuple[list[list[Message]], list[int]]:
    """Games to be shown, and secrets to be trained on."""
    chance = random.Random(seed)
    secrets = [number for number in NUMBERS if number not in HELD_OUT]
    shown = [played(chance.choice(secrets), chance) for _ in range(NUM_SHOWN)]
    return shown, chance.choices(secrets, k=NUM_PROBLEMS)


def make(folder: Path, seed: int) -> None:
    shown, train = make_games(seed)
    for name, secrets in (("held_out", [*HELD_OUT] * GAMES_OF_EACH), ("train", train)):
        prompt = possible(NUMBERS[0], NUMBERS[-1])
        write_rows(folder / f"{name}.jsonl", [{"prompt": prompt, "secret": secret} for secret in secrets])
    lesson = Lesson(name="games", conversations=shown, steps=STEPS, lr=LR)
    numbers = list(map(str, NUMBERS))
    make_model(folder / "model", pieces=PIECES, words=WORDS, lessons=[lesson], emphasized=numbers, seed=seed)


def guesses_of(row: Mapping[str, Json]) -> int:
    """The guesses of a game. One that was not won counts as one more than is allowed."""
    episode = episode_of(row)
    messages = episode["messages"]
    assert isinstance(messages, list), "as recorded"
    turns = sum(isinstance(said, dict) and said["role"] == "assistant" for said in messages)
    return turns if episode["ending"] == "terminated" else MAX_TURNS + 1


def measure(rows: Sequence[Mapping[str, Json]]) -> dict[str, float]:
    guesses = list(map(guesses_of, rows))
    return {"guesses": mean(guesses), "won": mean(number <= MAX_TURNS for number in guesses)}


def reached(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    return after["guesses"] <= GOAL


def show(measured: Mapping[str, float]) -> str:
    return f"{measured['guesses']:.2f} guesses, {measured['won']:.1%} won"


GAME = Task(
    name="game",
    num_held_out=len(HELD_OUT) * GAMES_OF_EACH,
    make=make,
    measure=measure,
    reached=reached,
    show=show,
)
