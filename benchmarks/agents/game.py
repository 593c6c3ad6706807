"""The task to guess a number from 1 to 100 in few turns.

The environment says of each guess only whether the number is higher or lower. Supervised learning on generated games
makes a model that knows binary search, but plays only a quarter of its games so, and guesses any numbers in the others.
No game has one of the held-out secrets.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from benchmarks.agents.small_model import TALK, Lesson, make_model
from benchmarks.agents.task import Task, episode_of, write_rows
from benchmarks.agents.user_code.game import HIGHER, LOWER, NUM_NUMBERS
from rlhf.types import Json, Message

NUMBERS = range(1, NUM_NUMBERS + 1)
PROMPT = "guess"
WORDS = (PROMPT, HIGHER, LOWER, "right", *map(str, range(10, NUM_NUMBERS + 1)))
PIECES = r"\d+|[a-z]+|[\s\S]"
MAX_TURNS = 8
MARGIN = 1.3
"""How many guesses more than binary search needs on average."""
GAMES_OF_EACH = 10
NUM_SHOWN, NUM_PROBLEMS = 4000, 2000
SEARCH_SHARE = 0.25
LESSONS = ((1.0, 200, 3e-3), (SEARCH_SHARE, 100, 5e-4))
"""Share of games by binary search, steps, learning rate."""


def binary_search(secret: int) -> list[int]:
    """The guesses of binary search."""
    low, high, guesses = NUMBERS[0], NUMBERS[-1], [(NUMBERS[0] + NUMBERS[-1]) // 2]
    while guesses[-1] != secret:
        low, high = (guesses[-1] + 1, high) if guesses[-1] < secret else (low, guesses[-1] - 1)
        guesses.append((low + high) // 2)
    return guesses


HELD_OUT = NUMBERS[2::5]
"""Secrets that no model is shown or trained on."""
GOAL = mean(len(binary_search(secret)) for secret in HELD_OUT) + MARGIN


def played(secret: int, search_share: float, chance: random.Random) -> list[Message]:
    """A game by binary search, with the chance of `search_share`, or else one whose guesses are any numbers."""
    is_search = chance.random() < search_share
    guesses = binary_search(secret) if is_search else chance.choices(NUMBERS, k=MAX_TURNS)
    said = [Message(role="user", content=PROMPT)]
    for guess in guesses:
        said.append(Message(role="assistant", content=str(guess)))
        if guess == secret:
            break
        said.append(Message(role="user", content=HIGHER if guess < secret else LOWER))
    return said


def make_games(seed: int) -> tuple[list[list[list[Message]]], list[int]]:
    """The games of each lesson, and secrets to be trained on."""
    secrets = [number for number in NUMBERS if number not in HELD_OUT]
    lessons = []
    for share, _, _ in LESSONS:
        chance = random.Random(seed)
        lessons.append([played(chance.choice(secrets), share, chance) for _ in range(NUM_SHOWN)])
    return lessons, random.Random(seed).choices(secrets, k=NUM_PROBLEMS)


def make(folder: Path, seed: int) -> None:
    shown, train = make_games(seed)
    for name, secrets in (("held_out", [*HELD_OUT] * GAMES_OF_EACH), ("train", train)):
        write_rows(folder / f"{name}.jsonl", [{"prompt": PROMPT, "secret": secret} for secret in secrets])
    lessons = [
        Lesson(name=f"{share:.0%} searched", conversations=games, steps=steps, lr=lr)
        for (share, steps, lr), games in zip(LESSONS, shown, strict=True)
    ]
    numbers = list(map(str, NUMBERS))
    make_model(folder / "model", form=TALK, pieces=PIECES, words=WORDS, lessons=lessons, emphasized=numbers, seed=seed)


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
