"""Online DPO: which answers are paired, what they are held against, and which models that takes."""

import math

import numpy as np
import pytest
import torch

from rlhf.algorithms.base import EmaReference, Outputs, TensorBatch
from rlhf.algorithms.online_dpo import OnlineDPO, distance
from rlhf.config.algo import OnlineDpoSection
from rlhf.config.algo.preference import DpoLoss
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, plan_batches
from rlhf.orchestrator.step.mismatch import log_prob_mismatch
from rlhf.types import Example, FinishReason, Head, Metrics, Role, Signal, Signals
from tests.unit.algorithms.build import group, rollout

ANSWERS = [rollout([i, i + 1], name=f"a{i}", log_probs=[-1.0 * i, -2.0 * i]) for i in range(1, 5)]
"""Answers that differ, by what the sampler thought of them."""


def said(value: float) -> tuple[np.ndarray, ...]:
    """What a model says about the prompt's three tokens, and about two answers' two tokens."""
    return tuple(np.array([np.nan] * 3 + [value * n, value * n], dtype=np.float32) for n in (1, 2))


def signals_of(*, old: float = -1.0, ref: float | None = -2.0) -> Signals:
    known = {Signal.OLD_LOG_PROBS: said(old)}
    return known if ref is None else {**known, Signal.REF_LOG_PROBS: said(ref)}


@pytest.mark.parametrize(
    ("values", "measures", "ema_reference", "mixture"),
    [
        ({}, {"old_log_probs", "ref_log_probs"}, None, 0.0),
        ({"reference": "behavior"}, {"old_log_probs"}, None, 0.0),
        (
            {"reference": "refresh", "reference_every_steps": 7},
            {"old_log_probs", "ref_log_probs"},
            EmaReference(every_steps=7, decay=0.0),
            0.0,
        ),
        (
            {"reference": "ema", "reference_decay": 0.9},
            {"old_log_probs", "ref_log_probs"},
            EmaReference(every_steps=1, decay=0.9),
            0.0,
        ),
        ({"mixture": 0.25, "loss": {"type": "ipo"}}, {"ref_log_probs"}, None, 0.25),
    ],
)
def test_needs(
    values: dict[str, object], measures: set[str], ema_reference: EmaReference | None, mixture: float
) -> None:
    section = OnlineDpoSection.model_validate(values)
    needs = OnlineDPO(section).needs
    assert needs.trains == {Role.POLICY: Head.LOG_PROBS}
    assert (needs.signals, needs.ema_reference, needs.mixture, needs.opponents) == (
        measures,
        ema_reference,
        mixture,
        None,
    )
    assert needs.online
    assert section.uses_reference is ("ref_log_probs" in needs.signals and ema_reference is None)


def test_best_against_worst_of_each_prompt_and_ties_dropped_and_counted() -> None:
    algorithm = OnlineDPO(OnlineDpoSection())
    aborted = rollout([9, 9], name="aborted", finish_reason=FinishReason.ABORTED)
    groups = [
        group(ANSWERS, [0.1, 0.9, -0.3, 0.2], name="x"),
        group(ANSWERS, [0.25] * 4, name="tied"),
        group([aborted, ANSWERS[0], ANSWERS[1]], [-9.0, 0.5, 0.25], name="y"),
        group([aborted, ANSWERS[0]], [-9.0, 0.5], name="alone"),
    ]
    assert all(algorithm.keep(g) for g in groups)
    examples = algorithm.select(groups)
    assert [(e.group, e.id, e.rewards) for e in examples] == [("x", "a2", (0.9, -0.3)), ("y", "a1", (0.5, 0.25))]
    _, metrics = algorithm.credit(examples, [signals_of(), signals_of()])
    expected = {"pairs/tied": 1.0, "pairs/empty": 1.0, "pairs/identical": 0.0, "pairs/score_gap": (1.2 + 0.25) / 2}
    assert {name: metrics.sums[name] for name in expected} == pytest.approx(expected)


def test_what_the_sampler_thought_is_compared_on_both_sides() -> None:
    algorithm = OnlineDPO(OnlineDpoSection())
    (example,) = algorithm.select([group(ANSWERS, [0.0, 3.0, 1.0, 2.0])])
    assert [array.tolist() for array in example.sampler_log_probs] == [[0, 0, 0, -2, -4], [0, 0, 0, -1, -2]]
    assert example.weight_version == 7
    signal = {Signal.OLD_LOG_PROBS: tuple(array - 0.5 for array in example.sampler_log_probs)}
    assert np.abs(log_prob_mismatch([example], [signal])).tolist() == [0.5] * 4


def test_a_mixtures_log_probs_are_not_the_policys() -> None:
    (example,) = OnlineDPO(OnlineDpoSection(mixture=0.3)).select([group(ANSWERS[:2], [0.0, 1.0])])
    assert example.sampler_log_probs == ()


@pytest.mark.parametrize(("reference", "held_against"), [("frozen", -2.0), ("behavior", -1.0), ("ema", -2.0)])
def test_what_the_pair_is_held_against(reference: str, held_against: float) -> None:
    algorithm = OnlineDPO(OnlineDpoSection.model_validate({"reference": reference}))
    examples = algorithm.select([group(ANSWERS[:2], [1.0, 0.0])])
    ((made,), _) = algorithm.credit(examples, [signals_of()])
    assert made.targets == (1.0, 0.0)
    got = [sequence.signals[Signal.REF_LOG_PROBS] for sequence in made.sequences]
    for array, wanted in zip(got, said(held_against), strict=True):
        np.testing.assert_array_equal(array, wanted)


def first_update(
    algorithm: OnlineDPO, *, limits: MicroBatchLimits | None = None
) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
    """Loss, gradient on the token log-probs, and figures of one pair, the policy as it sampled."""
    examples = algorithm.select([group(ANSWERS[:2], [1.0, 0.0])])
    signal = signals_of()
    (experiences, _) = algorithm.credit(examples, [signal])
    plan = plan_batches(experiences, MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=100))
    (batch,) = build_batches(plan, experiences, Role.POLICY)
    predictions = torch.tensor(np.concatenate(signal[Signal.OLD_LOG_PROBS]), dtype=torch.float64, requires_grad=True)
    tensors = TensorBatch.from_numpy(batch, torch.device("cpu"))
    got = algorithm.objectives()[Role.POLICY](Outputs(predictions=predictions), tensors)
    got.loss.backward()
    assert predictions.grad is not None
    return got.loss.detach(), predictions.grad, got.metrics


def test_held_to_its_own_behavior_the_loss_is_ln_2_and_still_teaches() -> None:
    """BPO: at the first update the logit is 0 and the gradient is not, beta/2 a token; and ln 2 is no standstill."""
    algorithm = OnlineDPO(
        OnlineDpoSection.model_validate({"reference": "behavior", "loss": {"type": "dpo", "beta": 0.4}})
    )
    loss, gradient, metrics = first_update(algorithm)
    assert loss.item() == pytest.approx(math.log(2))
    assert gradient.tolist() == pytest.approx([0, 0, 0, -0.2, -0.2, 0, 0, 0, 0.2, 0.2])
    for _ in range(200):
        assert algorithm.credit([], [])[1].warnings == ()
        algorithm.after_pass(metrics)


def test_a_frozen_reference_by_hand() -> None:
    """LR chosen = 2 * (-1 + 2) = 2, rejected = 2 * (-2 + 4) = 4: h = -2."""
    loss, _, metrics = first_update(OnlineDPO(OnlineDpoSection(loss=DpoLoss(beta=0.5))))
    assert loss.item() == pytest.approx(math.log1p(math.exp(1.0)))
    assert metrics.sums["pairs/accuracy"] == 0.0


@pytest.mark.parametrize(("kind", "expected"), [("ipo", (-1.0 - 1.0) ** 2), ("hinge", 1.0 + 1.0)])
def test_the_other_losses(kind: str, expected: float) -> None:
    algorithm = OnlineDPO(OnlineDpoSection.model_validate({"loss": {"type": kind, "beta": 0.5}}))
    assert first_update(algorithm)[0].item() == pytest.approx(expected)


def test_distance_to_the_reference_over_tokens_and_answers() -> None:
    (example,) = OnlineDPO(OnlineDpoSection()).select([group(ANSWERS[:2], [1.0, 0.0])])
    assert distance([example], [signals_of()]) == pytest.approx({"kl/ref_per_response": 3.0, "kl/ref_per_token": 1.5})
    assert distance([example], [signals_of(ref=None)]) == {}
    assert distance([], []) == {}


def test_a_frozen_reference_is_watched_for_a_standstill() -> None:
    algorithm = OnlineDPO(OnlineDpoSection())
    told: list[str] = []
    for _ in range(100):
        told += algorithm.credit([], [])[1].warnings
        algorithm.after_pass(Metrics(sums={"policy/loss": 0.6931}))
    assert len(told) == 1
    again = OnlineDPO(OnlineDpoSection())
    again.restore(algorithm.state())
    assert again.state() == algorithm.state()


def test_examples_hold_two_answers_to_one_prompt() -> None:
    (example,) = OnlineDPO(OnlineDpoSection()).select([group(ANSWERS[:2], [1.0, 0.0])])
    assert isinstance(example, Example)
    assert [s.token_ids.tolist() for s in example.sequences] == [[100, 101, 102, 1, 2], [100, 101, 102, 2, 3]]
    assert [s.loss_mask.tolist() for s in example.sequences] == [[False] * 3 + [True] * 2] * 2
