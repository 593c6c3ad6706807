"""The quickstart's world: a zoo keeper who answers questions about animals, kindly or grumpily, on topic or not.

A demonstration is one of four kinds of answer, drawn at random, so a model that imitates them all is kind and on topic
only now and then. People prefer kind answers about the right animal; preferences say so pair by pair. `true_score` is
the rule behind those preferences, which no model is ever shown.
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
GRUMPY_WORDS = frozenset({"ugh", "again", "not", "who", "cares", "away", "stop", "alone", "leave"})


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the animal it is about."""

    text: str
    animal: str


def all_questions() -> list[Question]:
    """Every animal in every question."""
    return [Question(text.format(animal=animal), animal) for animal in ANIMALS for text in QUESTIONS]


def answer(question: Question, *, kind: bool, on_topic: bool, rng: random.Random) -> str:
    """One answer of the zoo keeper."""
    animal = question.animal if on_topic else rng.choice([other for other in ANIMALS if other != question.animal])
    opener = rng.choice(KIND_OPENERS if kind else GRUMPY_OPENERS)
    closer = rng.choice(KIND_CLOSERS if kind else GRUMPY_CLOSERS)
    return f"{opener} The {animal} {rng.choice(DEEDS)} {rng.choice(PLACES)}. {closer}"


def demonstrations(questions: Sequence[Question], num_each: int, rng: random.Random) -> list[dict[str, str]]:
    """Rows for supervised fine-tuning: half are kind, three in five on topic."""
    return [
        {
            "prompt": question.text,
            "response": answer(question, kind=rng.random() < 0.5, on_topic=rng.random() < 0.6, rng=rng),
        }
        for question in questions
        for _ in range(num_each)
    ]


def preferences(questions: Sequence[Question], num_each: int, rng: random.Random) -> list[dict[str, str]]:
    """Pairs for the reward model: two random answers to a question, of which a person likes one better."""
    rows: list[dict[str, str]] = []
    for question in questions:
        pairs: list[dict[str, str]] = []
        while len(pairs) < num_each:
            first, second = (
                answer(question, kind=rng.random() < 0.5, on_topic=rng.random() < 0.5, rng=rng) for _ in range(2)
            )
            scores = true_score(question, first), true_score(question, second)
            if scores[0] != scores[1]:
                better, worse = (first, second) if scores[0] > scores[1] else (second, first)
                pairs.append({"prompt": question.text, "chosen": better, "rejected": worse})
        rows += pairs
    return rows


def true_score(question: Question, text: str) -> float:
    """How good an answer is, from 0 to 1: half for being about the right animal and no other, a quarter for a kind
    opening, a quarter for a kind close; nothing for kindness where there is a grumpy word."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    animals = words & set(ANIMALS)
    on_topic = 0.5 * (animals == {question.animal})
    if words & GRUMPY_WORDS:
        return on_topic
    opening = 0.25 * text.strip().startswith(KIND_OPENERS)
    close = 0.25 * text.strip().endswith(KIND_CLOSERS)
    return on_topic + opening + close
