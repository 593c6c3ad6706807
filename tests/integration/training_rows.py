"""Examples that the training engine's tests learn from."""

from dataclasses import replace

import numpy as np

from rlhf.types import Experience, LearnedSequence, Signal

LENGTHS = (9, 17, 30, 2, 12, 5, 22, 41, 1)
"""Tokens of the examples that the worker makes."""


def experiences(fill: float = 1.0, seed: int = 0) -> list[Experience]:
    """Answers of many lengths (one of a single token, which learns nothing) with advantages of both signs."""
    rng = np.random.default_rng(seed)
    made = []
    for i, n in enumerate(LENGTHS):
        sequence = LearnedSequence(
            token_ids=rng.integers(4, 99, size=n),
            loss_mask=np.arange(n) >= max(1, n // 3),
            signals={Signal.ADVANTAGES: (fill * rng.normal(size=n)).astype(np.float32)},
        )
        made.append(Experience(id=str(i), sequences=(sequence,)))
    return made


def whole(data: list[Experience]) -> list[Experience]:
    """The same tokens, all of them to be learned from."""
    sequences = [replace(one.sequences[0], loss_mask=np.ones_like(one.sequences[0].loss_mask)) for one in data]
    return [replace(one, sequences=(sequence,)) for one, sequence in zip(data, sequences, strict=True)]


def routed(data: list[Experience], *, seed: int = 5) -> list[Experience]:
    """The same tokens with random experts, two of four in each of two routers: unknown for each sequence's last token,
    and for all of the third sequence."""
    rng = np.random.default_rng(seed)
    made = []
    for i, one in enumerate(data):
        experts = rng.random((len(one.sequences[0]), 2, 4)).argsort(-1)[:, :, :2].astype(np.uint8)
        experts[-1] = 255
        sequence = replace(one.sequences[0], routed_experts=None if i == 2 else experts)
        made.append(replace(one, sequences=(sequence,)))
    return made


def rankings() -> list[Experience]:
    """Pairs, the better answer first."""
    rng = np.random.default_rng(3)
    return [
        Experience(
            id=str(i),
            sequences=tuple(
                LearnedSequence(token_ids=rng.integers(4, 99, size=n), loss_mask=np.ones(n, dtype=np.bool_))
                for n in sizes
            ),
            targets=(1.0, 0.0),
        )
        for i, sizes in enumerate(((7, 12), (20, 3), (5, 5)))
    ]
