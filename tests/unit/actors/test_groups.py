"""Ranks that compute each micro-batch together are one rank to the loop."""

import numpy as np
import pytest

from rlhf.actors.groups import EmaReferenceEngine, GroupEngine
from rlhf.types import FloatArray, PackedTokens, Role
from tests.unit.actors.test_probed import LocalGroup, worker

NUM_RANKS = 4


class Rank:
    """Gives back the tokens of its batches, and what it was given."""

    def __init__(self) -> None:
        self.given: list[int] = []

    def forward(self, role: Role, batches: list[PackedTokens]) -> list[FloatArray]:
        self.given = [int(batch.token_ids[0]) for batch in batches]
        return [batch.token_ids.astype(np.float32) for batch in batches]

    def forward_ema_reference(self, role: Role, batches: list[PackedTokens]) -> list[FloatArray]:
        return self.forward(role, batches)


@pytest.mark.parametrize(
    ("size", "given"),
    [(1, [[0], [1], [2], [3]]), (2, [[0, 1], [0, 1], [2, 3], [2, 3]]), (4, [[0, 1, 2, 3]] * 4)],
)
@pytest.mark.parametrize("kind", [GroupEngine, EmaReferenceEngine])
def test_ranks_that_compute_together_get_the_same_batches_and_answer_once(
    kind: type[GroupEngine], size: int, given: list[list[int]]
) -> None:
    ranks = [Rank() for _ in range(NUM_RANKS)]
    group = LocalGroup(*(worker(f"policy rank {i}", rank) for i, rank in enumerate(ranks)))
    engine = kind(group, Role.POLICY, step_timeout_s=1.0, sync_timeout_s=1.0, sequence_parallel_size=size)
    batches = [PackedTokens(token_ids=np.array([index]), lengths=np.array([1])) for index in range(4)]
    assert engine.num_ranks == NUM_RANKS // size
    assert [array.tolist() for array in engine.forward(batches)] == [[0.0], [1.0], [2.0], [3.0]]
    assert [rank.given for rank in ranks] == given
