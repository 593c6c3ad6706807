"""Which responses the metrics of a step are about."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms.response_metrics import length_metrics, response_metrics
from rlhf.algorithms.sequences import join, num_own_tokens
from rlhf.types import FinishReason
from tests.unit.algorithms.build import group, prompt, rollout


def test_responses_without_tokens_are_counted_and_nothing_else() -> None:
    cut = replace(rollout([1, 2, 3]), finish_reason=FinishReason.LENGTH)
    aborted = replace(rollout([1, 2]), finish_reason=FinishReason.ABORTED)
    groups = [group([cut, rollout([]), aborted], [1.0, -99.0, 50.0]), group([rollout([1])], [0.0])]
    assert response_metrics(groups) == {
        "reward/mean": 0.5,
        "reward/std": 0.5,
        "response/length": 2.0,
        "response/length_max": 3.0,
        "response/truncated": 0.5,
        "response/empty": 0.5,
    }


def test_a_length_is_that_of_the_models_own_tokens() -> None:
    (own,) = [rollout([1, 2, 3], loss_mask=[True, False, True])]
    assert response_metrics([group([own], [1.0])])["response/length"] == 2.0


@given(
    num_prompt=st.integers(0, 2),
    mask=st.none() | st.lists(st.booleans(), max_size=4),
    finish_reason=st.sampled_from(FinishReason),
)
def test_own_tokens_are_those_that_are_learned_from(
    num_prompt: int, mask: list[bool] | None, finish_reason: FinishReason
) -> None:
    response = rollout([1, 2, 3] if mask is None else [1] * len(mask), loss_mask=mask, finish_reason=finish_reason)
    before = prompt(num_prompt)
    assert num_own_tokens(before, response) == join(before, response).loss_mask.sum()


def test_a_step_without_responses_or_without_tokens() -> None:
    assert response_metrics([]) == {}
    silent = response_metrics([group([rollout([])], [1.0])])
    assert silent.pop("response/empty") == pytest.approx(1.0)
    assert set(silent.values()) == {0.0}
    assert length_metrics([]) == length_metrics([0]) == {"response/length": 0.0}
