"""Short stories for children, and what `rlhf example stories` makes of them.

A story is an opening and a few sentences, each joyful or plain by the toss of a coin: a model that imitates them all
writes a joyful story now and then, so that there is something to learn from a reward for joy.
"""

import random
import re
from collections.abc import Sequence

NAMES = ("Lily", "Tom", "Mia", "Max", "Ben", "Sue", "Tim", "Anna", "Jack", "Lucy", "Sam", "Amy")
BOYS = frozenset({"Tom", "Max", "Ben", "Tim", "Jack", "Sam"})
OPENINGS = (
    "Once upon a time, there was a little {kind} named {name}.",
    "One day, {name} went to the park with a friend.",
    "{name} had a big red ball.",
    "{name} and Mom were in the kitchen.",
    "It was a rainy day and {name} was sad.",
    "{name} found a small dog under a tree.",
    "In the morning, {name} saw a bird.",
    "{name} wanted to help the old cat.",
)
JOYFUL = (
    "{name} was very happy.", "{name} smiled at the {thing}.", "They laughed under the big tree.",
    "It was fun to run to the {place}.", "They played by the {place}.", "Mom gave {them} a hug.",
    "They said they love the {thing}.", "{name} loved to go to the {place}.",
)  # fmt: skip
PLAIN = (
    "{name} looked at the {thing}.", "The {thing} was old and brown.", "Then it began to rain.",
    "They walked to the {place}.", "{name} could not find the {thing}.", "Mom said it was time to eat.",
    "The wind was cold by the {place}.", "{name} sat down and was tired.", "They saw a {thing} near the {place}.",
)  # fmt: skip
THINGS = ("ball", "box", "boat", "hat", "toy car", "blue cup", "leaf", "book")
PLACES = ("park", "lake", "garden", "house", "shop", "hill")
SHARE_OF_JOYFUL = 0.3
MIN_SENTENCES, MAX_SENTENCES = 3, 4
JOYFUL_WORDS = frozenset({"happy", "smiled", "laughed", "fun", "played", "hug", "love", "loved"})


def openings() -> list[tuple[str, str]]:
    """Every opening with the name of its child."""
    return [
        (text.format(name=name, kind="boy" if name in BOYS else "girl"), name) for text in OPENINGS for name in NAMES
    ]


def story(name: str, rng: random.Random) -> str:
    """What follows an opening about `name`, with the space before it."""
    sentences = []
    for _ in range(rng.randint(MIN_SENTENCES, MAX_SENTENCES)):
        form = rng.choice(JOYFUL if rng.random() < SHARE_OF_JOYFUL else PLAIN)
        them = "him" if name in BOYS else "her"
        sentences.append(form.format(name=name, them=them, thing=rng.choice(THINGS), place=rng.choice(PLACES)))
    return " " + " ".join(sentences)


def joy_of(text: str) -> float:
    """The share of joyful words."""
    words = re.findall(r"[a-z]+", text.lower())
    return sum(word in JOYFUL_WORDS for word in words) / max(1, len(words))


def demonstrations(num_each: int, rng: random.Random) -> list[dict[str, str]]:
    """Rows for supervised fine-tuning, `num_each` for each opening."""
    return [{"prompt": opening, "response": story(name, rng)} for opening, name in openings() for _ in range(num_each)]


def pairs(num_each: int, rng: random.Random) -> list[dict[str, str]]:
    """Pairs of stories with the same opening; the more joyful one is chosen."""
    rows = []
    for opening, name in openings():
        for _ in range(num_each):
            worse, better = story(name, rng), story(name, rng)
            while joy_of(worse) == joy_of(better):
                better = story(name, rng)
            worse, better = sorted((worse, better), key=joy_of)
            rows.append({"prompt": opening, "chosen": better, "rejected": worse})
    return rows


def labeled(rows: Sequence[dict[str, str]]) -> list[dict[str, str | bool]]:
    """The stories of pairs, each with a label: whether it is the more joyful one."""
    return [
        {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
        for row in rows
        for key in ("chosen", "rejected")
    ]
