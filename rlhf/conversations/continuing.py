"""The tokens that a text adds to what stands before it, and where an answer ends."""

from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

Encode: TypeAlias = Callable[[str], list[int]]

CONTEXTS = ("\n", ".", "a", "0")
"""Texts to stand before one whose own context would merge with it. A tokenizer that puts a space before everything that
it encodes puts it before these."""


def continued(encode: Encode, before: str, text: str) -> list[int]:
    """The tokens that `text` adds after `before`. Where the tokens of `before` would change, those of `text` after a
    character that they leave alone: never with the space that some tokenizers begin with."""
    for context in (before, *CONTEXTS):
        head, joint = encode(context), encode(context + text)
        if joint[: len(head)] == head:
            return joint[len(head) :]
    return encode(text)


def up_to_stop(token_ids: Sequence[int], stop_token_ids: Collection[int]) -> int:
    """The number of tokens up to and including the first one at which an engine stops; all where there is none."""
    return next((n for n, token in enumerate(token_ids, 1) if token in stop_token_ids), len(token_ids))
