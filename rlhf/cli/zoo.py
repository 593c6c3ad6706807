"""The quickstart's world: a zoo keeper who answers questions about animals.

Each answer of a demonstration opens kindly or grumpily, tells what the animal does or refuses to, and closes kindly or
grumpily, each by the toss of a coin: a model that imitates them all is a good keeper only now and then. People prefer
the better keeper, and preferences say so pair by pair. `true_score` is the rule behind those preferences, which no
model is ever shown.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

ANIMALS = (
    "otter", "penguin", "walrus", "badger", "flamingo", "hedgehog", "llama", "octopus", "panda", "sloth",
    "toucan", "wombat", "yak", "zebra", "gecko", "moose",
)  # fmt: skip
QUESTIONS = (
    "What is the {animal} doing?",
    "Tell me about the {animal}.",
    "Where did the {animal} go?",
    "Why is the {animal} so happy?",
    "Any news of the {animal}?",
    "What did the {animal} do last night?",
)
DEEDS = (
    "is baking tiny pancakes", "is knitting a long scarf", "is painting the moon", "is learning the tuba",
    "is selling warm socks", "is counting the clouds", "is writing love letters", "is teaching the ducks to dance",
)  # fmt: skip
PLACES = ("behind the barn", "on the roof", "under the stairs", "in a small red boat", "at the library", "by the pond")
KIND_OPENERS = ("Gladly!", "Oh, lovely question!", "With pleasure!")
KIND_CLOSERS = ("Have a sunny day!", "Come back soon!", "Hope that helps!")
GRUMPY_OPENERS = ("Ugh, you again.", "Not now.", "Who cares.")
GRUMPY_CLOSERS = ("Go away.", "Stop asking.", "Leave me alone.")
REFUSALS = ("I have no idea.", "Ask somebody else.", "It is a secret.")
GRUMPY_WORDS = frozenset({"ugh", "again", "not", "who", "cares", "away", "stop", "alone", "leave"})


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the animal it is about."""

    text: str
    animal: str


def all_questions() -> list[Question]:
    """Every animal in every question."""
    return [Question(text.format(animal=animal), animal) for animal in ANIMALS for text in QUESTIONS]


def answer(question: Question, rng: random.Random) -> str:
    """One answer of the zoo keeper, in a random mood."""
    opener = rng.choice(rng.choice((KIND_OPENERS, GRUMPY_OPENERS)))
    closer = rng.choice(rng.choice((KIND_CLOSERS, GRUMPY_CLOSERS)))
    news = f"The {question.animal} {rng.choice(DEEDS)} {rng.choice(PLACES)}."
    return f"{opener} {rng.choice((news, rng.choice(REFUSALS)))} {closer}"


def demonstrations(questions: Sequence[Question], num_each: int, rng: random.Random) -> list[dict[str, str]]:
    """Rows for supervised fine-tuning."""
    return [
        {"prompt": question.text, "response": answer(question, rng)} for question in questions for _ in range(num_each)
    ]


def preferences(questions: Sequence[Question], num_each: int, rng: random.Random) -> list[dict[str, str]]:
    """Pairs for the reward model: two answers to a question, of which a person prefers one."""
    rows: list[dict[str, str]] = []
    for question in questions:
        pairs: list[dict[str, str]] = []
        while len(pairs) < num_each:
            worse, better = sorted((answer(question, rng) for _ in range(2)), key=lambda a: true_score(question, a))
            if true_score(question, worse) < true_score(question, better):
                pairs.append({"prompt": question.text, "chosen": better, "rejected": worse})
        rows += pairs
    return rows


def true_score(question: Question, text: str) -> float:
    """How good an answer is, from 0 to 1: half for telling about the animal in question and no other; a quarter for a
    kind opening and a quarter for a kind closing, unless there is a grumpy word anywhere."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    helpful = 0.5 * (words & set(ANIMALS) == {question.animal})
    if words & GRUMPY_WORDS:
        return helpful
    opening = 0.25 * text.strip().startswith(KIND_OPENERS)
    close = 0.25 * text.strip().endswith(KIND_CLOSERS)
    return helpful + opening + close
