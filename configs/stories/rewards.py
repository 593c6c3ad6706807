"""Rewards for stories. A reward function takes prompts and responses and returns one float for each response."""

import re

JOYFUL = frozenset(
    {"happy", "smiled", "smile", "laughed", "fun", "love", "loved", "hug", "hugged", "play", "played", "yay"}
)
WORDS_PER_JOY = 10


def joy(prompts: list[str], responses: list[str]) -> list[float]:
    """How joyful a story is, from 0 to 1: one joyful word in every ten is all the joy that counts."""
    return [min(1.0, WORDS_PER_JOY * _share_of_joy(response)) for response in responses]


def _share_of_joy(text: str) -> float:
    words = re.findall(r"[a-z]+", text.lower())
    return sum(word in JOYFUL for word in words) / max(len(words), 1)


def lipogram(prompts: list[str], responses: list[str]) -> list[float]:
    """How nearly a story does without the letter e: the share of its letters that are others. Every word
    counts, so that a few hundred pairs are enough to learn it from."""
    letters = [re.sub(r"[^a-z]", "", response.lower()) for response in responses]
    return [1.0 - text.count("e") / max(len(text), 1) for text in letters]
