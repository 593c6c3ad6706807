"""The metrics `reward/*` and `response/*` of the responses of a step. No other file computes them.

A response counts by its own tokens: those that the model wrote and that can be learned from. Responses without such a
token (empty or aborted ones) are counted in `response/empty` and in no other metric.
"""

from collections.abc import Sequence
from itertools import repeat

import numpy as np

from rlhf.algorithms.responses import mean
from rlhf.algorithms.sequences import is_empty
from rlhf.types import Example, ScoredGroup


def length_metrics(lengths: Sequence[int]) -> dict[str, float]:
    """`response/length`: mean number of own tokens, over responses that have one."""
    return {"response/length": mean([length for length in lengths if length])}


def response_metrics(examples: Sequence[Example]) -> dict[str, float]:
    """Rewards, lengths and truncation of the sampled responses that `examples` train on.

    An example may hold more sequences than rewards (KTO's mismatched responses, which were not sampled for their
    prompt), or more rewards than sequences (Nash-MD's opponents, which are not trained on): neither count. Empty
    where there are no examples.
    """
    responses = [
        (int(sequence.loss_mask.sum()), reward, is_truncated)
        for example in examples
        for sequence, reward, is_truncated in zip(
            example.sequences, example.rewards, example.truncated or repeat(False), strict=False
        )
    ]
    if not responses:
        return {}
    trained = [response for response in responses if response[0]]
    lengths = [length for length, _, _ in trained]
    rewards = np.array([reward for _, reward, _ in trained], dtype=np.float64)
    return {
        "reward/mean": mean(rewards),
        "reward/std": float(rewards.std()) if len(rewards) else 0.0,
        **length_metrics(lengths),
        "response/length_max": float(max(lengths, default=0)),
        "response/truncated": mean([is_truncated for _, _, is_truncated in trained]),
    }


def empty_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """`response/empty`: share of all responses of `groups` without a token to learn from."""
    empty = [is_empty(group.prompt, response) for group in groups for response in group.responses]
    return {"response/empty": mean(empty)}
