"""Which responses the metrics of a step are about."""

from collections.abc import Sequence

import numpy as np
import pytest

from rlhf.algorithms.response_metrics import empty_metrics, length_metrics, response_metrics
from rlhf.types import Example, TokenSequence


def sequence(num_tokens: int) -> TokenSequence:
    """Two tokens of a prompt and `num_tokens` of a response."""
    mask = np.arange(2 + num_tokens) >= 2
    return TokenSequence(token_ids=np.zeros(2 + num_tokens, dtype=np.int64), loss_mask=mask)


def example(lengths: Sequence[int], rewards: Sequence[float], truncated: Sequence[bool] = ()) -> Example:
    return Example(
        id="e",
        sequences=tuple(map(sequence, lengths)),
        rewards=tuple(rewards),
        truncated=tuple(truncated),
    )


def test_responses_without_tokens_do_not_count() -> None:
    examples = [example([3], [1.0], [True]), example([1], [0.0], [False]), example([0], [-99.0], [False])]
    assert response_metrics(examples) == {
        "reward/mean": 0.5,
        "reward/std": 0.5,
        "response/length": 2.0,
        "response/length_max": 3.0,
        "response/truncated": 0.5,
    }


def test_both_responses_of_a_pair_count() -> None:
    metrics = response_metrics([example([2, 4], [1.0, 0.0], [False, True])])
    assert (metrics["reward/mean"], metrics["response/length"], metrics["response/truncated"]) == (0.5, 3.0, 0.5)


def test_what_was_not_sampled_or_is_not_trained_on_does_not_count() -> None:
    """A response beside another prompt (KTO), and the reward of an opponent (Nash-MD)."""
    assert response_metrics([example([2, 9], [1.0], [False])])["response/length"] == 2.0
    assert response_metrics([example([2], [1.0, 7.0], [False])])["reward/mean"] == 1.0


def test_a_step_without_examples_or_without_tokens() -> None:
    assert response_metrics([]) == {}
    assert set(response_metrics([example([0], [1.0])]).values()) == {0.0}
    assert length_metrics([]) == length_metrics([0]) == {"response/length": 0.0}
    assert empty_metrics([])["response/empty"] == pytest.approx(0.0)
