"""The task to multiply: products of two numbers of three digits, which a small model cannot compute.

Supervised learning on generated conversations makes a model that calls a calculator and copies its result in a quarter
of its answers, and guesses a wrong number in the others.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from benchmarks.agents.small_model import CALLS, Lesson, make_model
from benchmarks.agents.task import Task, reward_of, write_rows
from rlhf.types import Json, Message

WORDS = ("tools", "multiply", "user", "assistant", "tool", "tool_call", "name", "arguments", "guess", "error")
PIECES = r"[a-z_]+|[\s\S]"
NUM_HELD_OUT, NUM_SHOWN, NUM_PROBLEMS = 256, 4000, 4000
CALL_SHARE = 0.25
LESSONS = ((1.0, 150, 3e-3), (CALL_SHARE, 100, 5e-4))
"""Share of conversations with calls, steps, learning rate: copying is learned first, where every conversation needs it;
a larger rate in the second lesson damages the calls."""
TOOLS: list[Json] = [{"type": "function", "function": {"name": "multiply"}}]

Problem = tuple[int, int]


def make_problems(seed: int) -> tuple[list[Problem], list[Problem], list[Problem]]:
    """Different problems in random order: those that are held out, shown to the model, and trained on.

    All are of three digits by three with a product of six: a tiny model learns to copy numbers of a fixed length within
    minutes.
    """
    chance = random.Random(seed)
    found: dict[Problem, None] = {}
    while len(found) < NUM_HELD_OUT + NUM_SHOWN + NUM_PROBLEMS:
        a, b = chance.randint(100, 999), chance.randint(100, 999)
        if a * b >= 100_000:
            found[a, b] = None
    problems = list(found)
    return problems[:NUM_HELD_OUT], problems[NUM_HELD_OUT:-NUM_PROBLEMS], problems[-NUM_PROBLEMS:]


def conversation(a: int, b: int, call_share: float, chance: random.Random) -> list[Message]:
    """One that calls the calculator, with the chance of `call_share`, or else guesses wrong."""
    question = Message(role="user", content=f"{a}*{b}")
    if chance.random() >= call_share:
        wrong = (a * b + chance.randint(1, 899_999)) % 900_000 + 100_000
        return [question, Message(role="assistant", content=f"guess {wrong}")]
    calls: Json = [{"type": "function", "function": {"name": "multiply", "arguments": {"a": a, "b": b}}}]
    return [
        question,
        Message(role="assistant", content="", fields={"tool_calls": calls}),
        Message(role="tool", content=str(a * b)),
        Message(role="assistant", content=str(a * b)),
    ]


def make(folder: Path, seed: int) -> None:
    held_out, shown, train = make_problems(seed)
    for name, part in (("held_out", held_out), ("train", train)):
        write_rows(folder / f"{name}.jsonl", [{"prompt": f"{a}*{b}", "answer": str(a * b)} for a, b in part])
    lessons = []
    for share, steps, lr in LESSONS:
        chance = random.Random(seed)
        conversations = [conversation(a, b, share, chance) for a, b in shown]
        lessons.append(Lesson(name=f"{share:.0%} calls", conversations=conversations, steps=steps, lr=lr, tools=TOOLS))
    make_model(
        folder / "model",
        form=CALLS,
        pieces=PIECES,
        words=WORDS,
        lessons=lessons,
        emphasized="0123456789",
        seed=seed,
    )


def measure(rows: Sequence[Mapping[str, Json]]) -> dict[str, float]:
    return {"exact": mean(map(reward_of, rows))}


def reached(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    return before["exact"] <= 0.3 and after["exact"] >= 0.9


def show(measured: Mapping[str, float]) -> str:
    return f"{measured['exact']:.1%} exact"


PRODUCTS = Task(
    name="products",
    num_held_out=NUM_HELD_OUT,
    make=make,
    measure=measure,
    reached=reached,
    show=show,
)
