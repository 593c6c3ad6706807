"""Online KTO: labels from scores, and what is left out."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms.kto import label_of
from rlhf.algorithms.online_kto import OnlineKTO
from rlhf.algorithms.response_metrics import response_metrics
from rlhf.config.algo import OnlineKtoSection
from rlhf.orchestrator.step.mismatch import log_prob_mismatch
from rlhf.types import Example, FinishReason, Head, Prompt, Role, ScoredGroup, Signal
from tests.unit.algorithms.build import group, rollout
from tests.unit.algorithms.test_kto import as_before, loss_of_step, signals_of

Threshold = Literal["group-mean", "batch-mean", "fixed"]


def sampled(number: int, scores: Sequence[float], lengths: Sequence[int] | None = None) -> ScoredGroup:
    """Answers to prompt `number`, of two tokens each."""
    answers = [
        rollout([number * 10 + i] * (lengths[i] if lengths else 2), name=f"1/p{number}/{i}") for i in range(len(scores))
    ]
    made = group(answers, scores, name=f"p{number}")
    return replace(made, prompt=Prompt(id=f"p{number}", token_ids=np.array([100 + number, 1]), text="?"))


def labels(threshold: Threshold, groups: Sequence[ScoredGroup], score: float = 0.0) -> dict[str, bool]:
    algorithm = OnlineKTO(OnlineKtoSection(threshold=threshold, threshold_score=score))
    return {example.id: label_of(example) for example in algorithm.select(groups)}


GROUPS = [sampled(1, [1.0, 2.0, 3.0]), sampled(2, [0.0, 0.0, 6.0])]


def test_needs() -> None:
    needs = OnlineKTO(OnlineKtoSection()).needs
    assert needs.trains == {Role.POLICY: Head.LOG_PROBS}
    assert needs.signals == {"old_log_probs", "ref_log_probs"}
    assert needs.online
    assert OnlineKTO(OnlineKtoSection()).keep(sampled(1, [1.0, 1.0]))


def test_above_the_mean_of_the_prompt_s_answers() -> None:
    """2.0 is exactly at its group's mean: left out."""
    expected = {"1/p1/0": False, "1/p1/2": True, "1/p2/0": False, "1/p2/1": False, "1/p2/2": True}
    assert labels("group-mean", GROUPS) == expected


def test_above_the_mean_of_the_batch() -> None:
    """2.0 is exactly at the batch's mean too."""
    expected = {"1/p1/0": False, "1/p1/2": True, "1/p2/0": False, "1/p2/1": False, "1/p2/2": True}
    assert labels("batch-mean", GROUPS) == expected
    assert labels("batch-mean", [GROUPS[0]] * 1) == {"1/p1/0": False, "1/p1/2": True}
    low, high = sampled(1, [0.0, 1.0]), sampled(2, [10.0, 11.0])
    assert list(labels("batch-mean", [low, high]).values()) == [False, False, True, True]
    assert list(labels("group-mean", [low, high]).values()) == [False, True, False, True]


def test_at_a_fixed_threshold_an_answer_is_good() -> None:
    assert list(labels("fixed", GROUPS, 2.0).values()) == [False, True, True, False, False, True]


@given(st.floats(-1e6, 1e6), st.integers(1, 12))
def test_equal_scores_are_all_at_their_mean(score: float, size: int) -> None:
    """Whatever floating point makes of the sum: 0.1 + 0.1 + 0.1 is not 0.3."""
    assert labels("group-mean", [sampled(1, [score] * size)]) == {}
    assert labels("batch-mean", [sampled(1, [score] * size)]) == {}


def test_what_is_left_out_is_counted() -> None:
    """An empty and an aborted answer have no label, and their scores are in no mean."""
    algorithm = OnlineKTO(OnlineKtoSection())
    one = sampled(1, [1.0, 2.0, 900.0, 900.0], lengths=[2, 2, 0, 2])
    one = replace(one, responses=(*one.responses[:3], replace(one.responses[3], finish_reason=FinishReason.ABORTED)))
    examples = algorithm.select([one, sampled(2, [4.0, 4.0])])
    assert [(e.id, label_of(e)) for e in examples] == [("1/p1/0", False), ("1/p1/1", True)]
    _, metrics = algorithm.credit(examples, signals_of(examples))
    assert (metrics.sums["labels/empty"], metrics.sums["labels/at_mean"]) == (2.0, 2.0)
    _, metrics = algorithm.credit(examples, signals_of(examples))
    assert (metrics.sums["labels/empty"], metrics.sums["labels/at_mean"]) == (0.0, 0.0)


def test_a_step_without_an_answer_selects_nothing() -> None:
    for threshold in ("group-mean", "batch-mean", "fixed"):
        assert OnlineKTO(OnlineKtoSection(threshold=threshold)).select([sampled(1, [1.0], lengths=[0])]) == []


def test_weights_are_of_the_batch_and_the_loss_is_kto_s() -> None:
    """Two of five answers are good."""
    algorithm = OnlineKTO(OnlineKtoSection(beta=0.5))
    examples = algorithm.select(GROUPS)
    signals = signals_of(examples)
    experiences, metrics = algorithm.credit(examples, signals)
    assert (metrics.sums["kto/desirable_weight"], metrics.sums["kto/undesirable_weight"]) == (1.5, 1.0)
    loss, _ = loss_of_step(algorithm, experiences, as_before(signals))
    assert loss.item() == pytest.approx(metrics.sums["kto/loss"], rel=1e-5)
    assert metrics.sums["kto/mismatched"] == 5.0
    responses = response_metrics(GROUPS)
    assert responses["reward/mean"] == pytest.approx((1 + 3 + 0 + 0 + 6) / 5)
    assert responses["response/length"] == 2.0


def test_only_what_was_sampled_is_compared_with_the_sampler() -> None:
    examples = OnlineKTO(OnlineKtoSection()).select(GROUPS)
    assert [len(e.sequences) for e in examples] == [2] * 5
    exact = [(np.where(e.sequences[0].loss_mask, -1.0, 0.0), np.full(len(e.sequences[1]), 9.0)) for e in examples]
    gap = log_prob_mismatch(examples, [{Signal.OLD_LOG_PROBS: arrays} for arrays in exact])
    assert gap.tolist() == [0.0] * 10


def test_group_answers_meet_answers_to_another_prompt() -> None:
    examples: list[Example] = OnlineKTO(OnlineKtoSection()).select(GROUPS)
    for example in examples:
        own, other = (sequence.token_ids for sequence in example.sequences)
        assert own[:2].tolist() == other[:2].tolist()
        assert own[2] // 10 != other[2] // 10


def test_no_few_responses_decide_a_step() -> None:
    """One good response among 16 would weigh 15 times as much as a bad one."""
    groups = [sampled(1, [0.0] * 15 + [16.0])]
    for settings, expected in (({}, 4.0), ({"max_class_weight": 20.0}, 15.0), ({"max_class_weight": 1.0}, 1.0)):
        algorithm = OnlineKTO(OnlineKtoSection.model_validate(settings))
        examples = algorithm.select(groups)
        sums = algorithm.credit(examples, signals_of(examples))[1].sums
        assert (sums["kto/desirable_weight"], sums["kto/undesirable_weight"]) == (expected, 1.0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"class_weights": "given"}, "10 good responses weigh 0.333 times as much as 30 bad ones"),
        ({"class_weights": "given", "desirable_weight": 3.0}, None),
        ({}, None),
    ],
)
def test_given_weights_that_are_off_are_told_once(settings: dict[str, object], said: str | None) -> None:
    """Also where the run begins again every three steps."""
    algorithm = OnlineKTO(OnlineKtoSection.model_validate(settings))
    told: list[str] = []
    for step in range(25):
        if step % 3 == 0:
            state = json.loads(json.dumps(algorithm.state()))
            algorithm = OnlineKTO(OnlineKtoSection.model_validate(settings))
            algorithm.restore(state)
        examples = algorithm.select([sampled(1, [0.0, 0.0, 0.0, 4.0])])
        _, metrics = algorithm.credit(examples, signals_of(examples))
        told += metrics.warnings
    assert len(told) == (said is not None)
    assert said is None or said in told[0]
