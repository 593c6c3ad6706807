"""Importance weights: by hand, against the definition on a small world, and what cannot be weighed."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch

from rlhf.algorithms import build_algorithm
from rlhf.algorithms.base import Outputs, TensorBatch
from rlhf.algorithms.importance import batch_weights, importance_weights
from rlhf.algorithms.losses import ppo_clip
from rlhf.algorithms.responses import ResponseTokens
from rlhf.config.algo import (
    Correction,
    CriticFreeSection,
    GrpoSection,
    GspoSection,
    MaskedWeights,
    NoCorrection,
    RatioToSampler,
    TruncatedWeights,
)
from rlhf.errors import NumericsError
from rlhf.types import Role, Signal
from tests.unit.algorithms.build import group, rollout, tensor_batch


def answer(ratios: Sequence[float]) -> ResponseTokens:
    """One answer whose tokens the trainer finds that many times as likely as the sampler did."""
    sampler = np.full(len(ratios), -2.0, dtype=np.float32)
    with np.errstate(divide="ignore"):
        old = sampler.astype(np.float64) + np.log(np.array(ratios, dtype=np.float64))
    return ResponseTokens(score=0.0, old_log_probs=old, values=np.zeros(0), sampler_log_probs=sampler)


def unknown_at(one: ResponseTokens, *positions: int, value: float = math.nan) -> ResponseTokens:
    sampled = np.array(one.sampler_log_probs)
    sampled[list(positions)] = value
    return ResponseTokens(score=0.0, old_log_probs=one.old_log_probs, values=np.zeros(0), sampler_log_probs=sampled)


def weights(correction: Correction, *answers: ResponseTokens) -> list[list[float]]:
    return [one.tolist() for one in importance_weights(correction, answers)[0]]


def close(*rows: Sequence[float]) -> list[object]:
    return [pytest.approx(row, rel=1e-6) for row in rows]


ANSWERS: tuple[list[float], ...] = ([0.25, 1.0, 3.0], [], [1.5], [0.5625, 4.0])


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        (NoCorrection(), ([1, 1, 1], [], [1], [1, 1])),
        (TruncatedWeights(), ([0.25, 1, 2], [], [1.5], [0.5625, 2])),
        (TruncatedWeights(cap=1.0), ([0.25, 1, 1], [], [1], [0.5625, 1])),
        (TruncatedWeights(level="sequence"), ([0.75] * 3, [], [1.5], [2, 2])),
        (TruncatedWeights(level="sequence", cap=1.8), ([0.75] * 3, [], [1.5], [1.8, 1.8])),
        (MaskedWeights(), ([0, 1, 0], [], [1.5], [0.5625, 0])),
        (MaskedWeights(low=0.2, high=3.5), ([0.25, 1, 3], [], [1.5], [0.5625, 0])),
        (MaskedWeights(level="sequence", high=1.6), ([0.75] * 3, [], [1.5], [0, 0])),
    ],
)  # fmt: skip
def test_weights_by_hand(correction: Correction, expected: Sequence[Sequence[float]]) -> None:
    assert weights(correction, *map(answer, ANSWERS)) == close(*expected)


def packed(*answers: ResponseTokens) -> TensorBatch:
    """The answers in one micro-batch, each behind a prompt of two tokens and with one token that nobody sampled."""
    masks, columns = [], []
    for one in answers:
        mask = np.array([False, False, *[True] * len(one), False])
        column = np.full((2, len(mask)), np.nan)
        column[:, mask] = one.old_log_probs, np.array(one.sampler_log_probs)
        masks.append(mask)
        columns.append(column)
    old, sampled = torch.tensor(np.concatenate(columns, axis=1))
    mask = np.concatenate(masks).tolist()
    lengths = [len(one) for one in masks]
    return tensor_batch(mask, lengths, old_log_probs=old, sampler_log_probs=sampled.float())


CORRECTIONS: tuple[Correction, ...] = (
    NoCorrection(),
    RatioToSampler(),
    TruncatedWeights(),
    TruncatedWeights(level="sequence", cap=1.8),
    MaskedWeights(),
    MaskedWeights(level="sequence", high=1.6),
)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_micro_batch_has_the_weights_of_its_responses(correction: Correction) -> None:
    """0 outside of responses, whatever the log-probs there."""
    answers = [unknown_at(answer([1.0, 2.0]), 1), *map(answer, ANSWERS)]
    batch = packed(*answers)
    got = batch_weights(correction, batch.signals[Signal.OLD_LOG_PROBS], batch)
    assert not got[~batch.loss_mask].any()
    expected = [number for row in weights(correction, *answers) for number in row]
    assert got[batch.loss_mask].tolist() == expected


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (GrpoSection(scale="none"), [0.75, 1.6, 2.0, 0.25]),
        (GspoSection(scale="none"), [1.2, 1.2, 0.625, 0.625]),
    ],
)
def test_the_default_weight_is_that_of_the_action(section: CriticFreeSection, expected: Sequence[float]) -> None:
    """GRPO's action is a token. GSPO's is the response: 3/4 * 8/5 = 6/5, and 5/2 * 1/4 = 5/8, at each of its tokens;
    at token level the 5/2 is cut at 2."""
    batch = packed(answer([0.75, 1.6]), answer([2.5, 0.25]))
    got = batch_weights(section.correction, batch.signals[Signal.OLD_LOG_PROBS], batch)
    assert got[batch.loss_mask].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("correction", CORRECTIONS[2:])
def test_the_loss_of_a_token_has_its_weight(correction: Correction) -> None:
    """The gradient of a loss with the correction is that of advantages which were multiplied by the weights."""
    batch = packed(*map(answer, ANSWERS))
    old = batch.signals[Signal.OLD_LOG_PROBS]
    advantages = torch.linspace(-1.0, 2.0, len(old), dtype=torch.float64)
    weighed = advantages * batch_weights(correction, old, batch)

    def gradient(correction: Correction, advantages: torch.Tensor) -> torch.Tensor:
        objective = build_algorithm(GrpoSection(correction=correction)).objectives()[Role.POLICY]
        predictions = torch.where(batch.loss_mask, old + 0.01, 0.0).requires_grad_()
        signals = {**batch.signals, Signal.ADVANTAGES: advantages}
        outputs = Outputs(predictions=predictions, entropy=torch.zeros_like(old))
        objective(outputs, replace(batch, signals=signals)).loss.backward()
        assert predictions.grad is not None
        return predictions.grad

    got = gradient(correction, advantages)
    assert torch.equal(got, gradient(NoCorrection(), weighed))
    assert not torch.allclose(got, gradient(NoCorrection(), advantages))


def test_figures_by_hand() -> None:
    """Weights 1/4 1 2 | 3/2 | 9/16 2; two of six were cut."""
    _, metrics = importance_weights(TruncatedWeights(), [answer(ratios) for ratios in ANSWERS])
    assert metrics.sums == pytest.approx(
        {
            "importance/weight": 7.3125 / 6,
            "importance/cut": 2 / 6,
            "importance/effective": 7.3125**2 / (6 * (1 / 16 + 1 + 4 + 9 / 4 + 81 / 256 + 4)),
        }
    )
    assert metrics.maxima == pytest.approx({"importance/ratio_max": 4.0})
    assert not importance_weights(NoCorrection(), [answer([1.0])])[1].sums


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_of_many_responses_are_those_of_each_alone(level: Literal["token", "sequence"]) -> None:
    """Bit for bit, also where responses are computed together."""
    draw = np.random.default_rng(0)
    many = [answer(np.exp(draw.normal(size=n)).tolist()) for n in draw.integers(0, 40, size=150)]
    many = [unknown_at(one, 0) if number == 70 else one for number, one in enumerate(many)]

    def alone(one: ResponseTokens) -> list[float]:
        assert one.sampler_log_probs is not None
        gap = one.old_log_probs - one.sampler_log_probs.astype(np.float64)
        gap = np.full(len(gap), gap.sum()) if level == "sequence" else gap
        return [min(float(np.exp(x)), 2.0) if math.isfinite(x) else 0.0 for x in gap]

    assert weights(TruncatedWeights(level=level), *many) == [alone(one) for one in many]


def test_equal_policies_weigh_1_and_are_worth_all_their_tokens() -> None:
    got, metrics = importance_weights(TruncatedWeights(), [answer([1.0, 1.0]), answer([1.0])])
    assert [one.tolist() for one in got] == [[1.0, 1.0], [1.0]]
    assert metrics.sums == {"importance/weight": 1.0, "importance/cut": 0.0, "importance/effective": 1.0}


@pytest.mark.parametrize("correction", [TruncatedWeights(), MaskedWeights(), TruncatedWeights(level="sequence")])
def test_nothing_to_weigh(correction: Correction) -> None:
    assert weights(correction) == []
    got, metrics = importance_weights(correction, [answer([])])
    assert [one.tolist() for one in got] == [[]]
    assert metrics.sums == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("correction", "dropped"),
    [(TruncatedWeights(), [1]), (MaskedWeights(), [1]), (TruncatedWeights(level="sequence"), [0, 1, 2])],
)
def test_a_token_that_the_sampler_cannot_vouch_for_teaches_nothing(
    correction: Correction, dropped: list[int], value: float
) -> None:
    """Also where it claims to have sampled what it finds impossible."""
    many = answer([1.0] * 2000)
    got = weights(correction, unknown_at(answer([1.0, 1.0, 1.0]), 1, value=value), many)
    assert got[0] == [0.0 if i in dropped else 1.0 for i in range(3)]
    assert got[1] == [1.0] * 2000


def test_many_such_tokens_end_the_run_before_it_learns() -> None:
    def credit(correction: Correction) -> None:
        answers = [rollout([5] * n, name=f"p{n}", log_probs=[value] * n) for n, value in ((3, math.nan), (2000, -1.0))]
        algorithm = build_algorithm(GrpoSection(correction=correction))
        algorithm.credit(algorithm.select([group(answers, [1.0, 0.0])]), [{}, {}])

    with pytest.raises(NumericsError, match="sampler: 3 of 2003 log-probs are not finite"):
        credit(TruncatedWeights())
    credit(NoCorrection())


def test_an_example_without_the_samplers_log_probs_is_an_error() -> None:
    silent = ResponseTokens(score=0.0, old_log_probs=np.zeros(1), values=np.zeros(0))
    with pytest.raises(ValueError, match="sampler_log_probs"):
        weights(TruncatedWeights(), silent)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("log_ratio", [-100.0, 100.0, 1e30])
def test_far_policies_stay_finite(level: str, log_ratio: float) -> None:
    far = ResponseTokens(
        score=0.0,
        old_log_probs=np.full(5, log_ratio),
        values=np.zeros(0),
        sampler_log_probs=np.zeros(5, dtype=np.float32),
    )
    correction = TruncatedWeights.model_validate({"level": level})
    got, metrics = importance_weights(correction, [far])
    assert np.isfinite(got[0]).all()
    assert (got[0] <= 2.0).all()
    assert all(math.isfinite(number) for number in (*metrics.sums.values(), *metrics.maxima.values()))


def test_the_weighted_gradient_is_that_of_the_policy_although_another_one_sampled() -> None:
    """Exactly, over a world of five actions: E_q[w * A * grad log p] = E_p[A * grad log p]; without weights it is not.
    That is what makes rollouts that are some versions old sound."""
    generator = torch.Generator().manual_seed(3)
    q, logits = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))
    q = q.log_softmax(0)
    advantages = torch.randn(5, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    p = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((p.exp() * advantages).sum(), logits, retain_graph=True)
    one = ResponseTokens(
        score=0.0,
        old_log_probs=p.detach().numpy(),
        values=np.zeros(0),
        sampler_log_probs=q.numpy().astype(np.float32),
    )

    def gradient(correction: Correction) -> torch.Tensor:
        (weight,), _ = importance_weights(correction, [one])
        loss = ppo_clip(p - p.detach(), advantages * torch.from_numpy(weight), 0.2, 0.2)
        return torch.autograd.grad((q.exp() * loss).sum(), logits, retain_graph=True)[0]

    torch.testing.assert_close(-gradient(TruncatedWeights(cap=1e6)), exact, rtol=1e-5, atol=1e-7)
    assert (-gradient(NoCorrection()) - exact).abs().max() > 0.05
    against_sampler = (q.exp() * ppo_clip(p - q, advantages, 1.0, 1e6)).sum()
    torch.testing.assert_close(-torch.autograd.grad(against_sampler, logits)[0], exact, rtol=1e-5, atol=1e-7)


def test_a_weight_on_the_advantage_is_a_weight_on_the_loss() -> None:
    """On both arms of the min and on both sides of the clip."""
    log_ratio = torch.linspace(-1.0, 1.0, 9, dtype=torch.float64)
    for advantage in (-1.5, 0.0, 1.5):
        for weight in (0.0, 0.3, 2.0):
            a = torch.full((9,), advantage, dtype=torch.float64)
            torch.testing.assert_close(
                ppo_clip(log_ratio, a * weight, 0.2, 0.3), weight * ppo_clip(log_ratio, a, 0.2, 0.3)
            )
