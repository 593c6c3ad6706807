"""The metrics `reward/*` and `response/*` of the responses of a step. No other file computes them.

A response counts by its own tokens: those that the model wrote and that can be learned from. Responses without such a
token (empty or aborted ones) are counted in `response/empty` and in no other metric.
"""

from collections.abc import Sequence

import numpy as np

from rlhf.algorithms.responses import mean
from rlhf.algorithms.sequences import num_own_tokens
from rlhf.types import FinishReason, ScoredGroup


def length_metrics(lengths: Sequence[int]) -> dict[str, float]:
    """`response/length`: mean number of own tokens, over responses that have one."""
    return {"response/length": mean([length for length in lengths if length])}


def response_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Rewards, lengths and truncation of the responses of a step's groups. Empty where there is no response."""
    responses = [
        (num_own_tokens(group.prompt, response), reward.total, response.finish_reason)
        for group in groups
        for response, reward in zip(group.responses, group.rewards, strict=True)
    ]
    if not responses:
        return {}
    counted = [response for response in responses if response[0]]
    lengths = [length for length, _, _ in counted]
    rewards = np.array([reward for _, reward, _ in counted], dtype=np.float64)
    return {
        "reward/mean": mean(rewards),
        "reward/std": float(rewards.std()) if len(rewards) else 0.0,
        **length_metrics(lengths),
        "response/length_max": float(max(lengths, default=0)),
        "response/truncated": mean([reason is FinishReason.LENGTH for _, _, reason in counted]),
        "response/empty": mean([not length for length, _, _ in responses]),
    }
