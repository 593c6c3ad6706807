"""Rewards for stories. A reward function takes prompts and responses and returns one float for each response."""

import re

JOYFUL = frozenset(
    {"happy", "smiled", "smile", "laughed", "fun", "love", "loved", "hug", "hugged", "play", "played", "yay"}
)
WORDS_PER_JOY = 10


def joy(prompts: list[str], responses: list[str]) -> list[float]:
    """How joyful a story is, from 0 to 1: 1 if at least one word in ten is a joyful one."""
    return [min(1.0, WORDS_PER_JOY * _share_of_joy(response)) for response in responses]


def _share_of_joy(text: str) -> float:
    words = re.findall(r"[a-z]+", text.lower())
    return sum(word in JOYFUL for word in words) / max(len(words), 1)


def lipogram(prompts: list[str], responses: list[str]) -> list[float]:
    """The share of a story's letters that are not the letter e. Every word matters, so a few hundred pairs are enough
    to learn it."""
    letters = [re.sub(r"[^a-z]", "", response.lower()) for response in responses]
    return [1.0 - text.count("e") / max(len(text), 1) for text in letters]
