"""Computing with the tokens of many responses at once, laid end to end: an operation of numpy costs about a
microsecond, however short its arrays are."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")
N = TypeVar("N", bound=np.generic)

CHUNK_RESPONSES = 64
"""Few enough that the arrays of their tokens stay in the processor's cache."""


def chunks(responses: Sequence[T], size: int = CHUNK_RESPONSES) -> Iterator[Sequence[T]]:
    """The responses, `size` at a time."""
    return (responses[start : start + size] for start in range(0, len(responses), size))


def split(joined: npt.NDArray[N], lengths: Sequence[int]) -> list[npt.NDArray[N]]:
    """The arrays, of these lengths, that `joined` was made of. They share its memory."""
    return [joined[end - length : end] for length, end in zip(lengths, accumulate(lengths), strict=True)]
