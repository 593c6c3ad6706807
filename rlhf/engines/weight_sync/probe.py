"""The last check of a sync: does the engine compute what the trainer computes?

Equal digests prove that the bytes arrived, not that the engine uses them: a stale packed copy of a weight shows only
in the log-probs.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from rlhf.engines.base import RolloutEngine
from rlhf.errors import WeightSyncError
from rlhf.types import FloatArray, PackedTokens

FLOAT32_TOLERANCE = 1e-3
"""Nats. Kernels round differently; stale weights differ by a hundred times that."""


def probe(
    engines: Mapping[str, RolloutEngine],
    sequences: Sequence[PackedTokens],
    expected: Sequence[FloatArray],
    *,
    version: int,
    tolerance: float = FLOAT32_TOLERANCE,
) -> float:
    """Have every engine score `sequences` at temperature 1 and compare with `expected`, the trainer's log-probs [T].

    Returns the largest difference in nats; raises WeightSyncError that names each engine beyond `tolerance`.
    """
    differences = {name: largest_difference(engine.score(sequences), expected) for name, engine in engines.items()}
    problems = [
        f"engine {name}: version {version}: log-probs differ from the trainer's by {difference:.2g} (at most "
        f"{tolerance:g}): the weights arrived but are not what it computes with"
        for name, difference in differences.items()
        if not difference <= tolerance  # NaN is beyond every tolerance
    ]
    if problems:
        raise WeightSyncError("\n".join(problems))
    return max(differences.values(), default=0.0)


def largest_difference(scores: Sequence[FloatArray], expected: Sequence[FloatArray]) -> float:
    """Over all tokens; NaN if any is NaN on one side."""
    pairs = zip(scores, expected, strict=True)
    return max((float(np.max(np.abs(a - b), initial=0.0)) for a, b in pairs), default=0.0)
