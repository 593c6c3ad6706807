"""PPO's losses against a float64 implementation written from the papers, token by token.

TRL 1.16 ships no PPO trainer, and its other losses are private methods of trainers, so there is none to import.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.algorithms.base import LossOutput, Outputs, TensorBatch
from rlhf.algorithms.ppo import PPO
from rlhf.config.algo import PpoSection
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, pack_tokens, plan_batches
from rlhf.types import Experience, LearnedSequence, Metrics, Role, Signal
from tests.unit.algorithms.build import COLUMNS, tensor_batch

LENGTHS = [5, 1, 0, 3, 4]
MASK = [False, True, True, False, True] + [False] + [False, True, True] + [False] * 4
"""A gap inside (an environment's token), a single token, nothing, an odd one, and one without tokens to learn."""
COEFFICIENTS = {"kl": 0.3, "penalty": 0.7}

SECTIONS = {
    "clip": PpoSection(),
    "uneven clip": PpoSection(clip_low=0.05, clip_high=0.4, entropy_coef=0.02),
    "dual clip": PpoSection(dual_clip=1.05),
    "humanline": PpoSection(humanline=True, humanline_low=-0.1, humanline_high=0.15),
    "kl in the loss": PpoSection(kl_placement="loss"),
    "k2 in the loss": PpoSection(kl_placement="loss", kl_estimator="k2"),
    "penalty": PpoSection(loss="penalty", num_epochs=2),
    "sequence mean": PpoSection(aggregation="seq-mean-token-mean", kl_placement="loss", entropy_coef=0.1),
    "constant length": PpoSection(aggregation="seq-mean-token-sum-norm", aggregation_tokens=7),
    "whole answer": PpoSection(token_level=False, value_clip=0.0),
}
section = pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS.keys())


def numbers(seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(len(MASK), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def micro_batch(dtype: torch.dtype = torch.float64, poison: float = 0.0) -> TensorBatch:
    """A batch of random columns; what is not learned from holds `poison`."""
    mask = torch.tensor(MASK)
    columns = {
        "old_log_probs": -1.0 + numbers(1, 0.3),
        "ref_log_probs": -1.0 + numbers(2, 0.3),
        "advantages": numbers(3),
        "returns": numbers(4),
        "values": numbers(5),
    }
    poisoned = {name: column.where(mask, poison).to(dtype) for name, column in columns.items()}
    return tensor_batch(MASK, LENGTHS, coefficients=COEFFICIENTS, **poisoned)  # type: ignore[arg-type]


def outputs(dtype: torch.dtype = torch.float64) -> Outputs:
    predictions = (-1.0 + numbers(6, 0.3)).to(dtype).requires_grad_()
    return Outputs(predictions=predictions, entropy=numbers(7).abs().to(dtype).requires_grad_())


def policy_loss_by_definition(section: PpoSection, x: Outputs, b: TensorBatch) -> float:
    """Plain floats, one token after another."""
    assert x.entropy is not None
    predictions, entropy = x.predictions.detach(), x.entropy.detach()
    total = 0.0
    num_tokens = sum(MASK)
    spans = [(sum(LENGTHS[:i]), sum(LENGTHS[: i + 1])) for i in range(len(LENGTHS))]
    num_sequences = sum(any(MASK[start:end]) for start, end in spans)
    for start, end in spans:
        tokens = [t for t in range(start, end) if MASK[t]]
        for t in tokens:
            new, old, ref = (
                float(c[t]) for c in (predictions, b.signals[Signal.OLD_LOG_PROBS], b.signals[Signal.REF_LOG_PROBS])
            )
            advantage = float(b.signals[Signal.ADVANTAGES][t])
            low, high = section.log_ratio_limits or (-math.inf, math.inf)
            ratio = math.exp(min(max(new - old, low), high))
            if not section.token_level:
                ratio = math.exp(sum(float(predictions[s] - b.signals[Signal.OLD_LOG_PROBS][s]) for s in tokens))
            if section.loss == "clip":
                clipped = min(max(ratio, 1 - section.clip_low), 1 + section.clip_high)
                loss = -min(ratio * advantage, clipped * advantage)
                if section.dual_clip:
                    loss = min(loss, section.dual_clip * abs(advantage))
            else:
                loss = -(ratio * advantage - COEFFICIENTS["penalty"] * (ratio - 1 - math.log(ratio)))
            loss -= section.entropy_coef * float(entropy[t])
            if section.kl_placement == "loss":
                k = {"k2": (new - ref) ** 2 / 2, "k3": math.exp(ref - new) - 1 + new - ref}[section.estimator]
                loss += COEFFICIENTS["kl"] * math.exp(new - old) * k
            if section.aggregation == "seq-mean-token-mean" or not section.token_level:
                total += loss / len(tokens) / num_sequences
            elif section.aggregation == "token-mean":
                total += loss / num_tokens
            else:
                total += loss / section.aggregation_tokens / num_sequences
    return total


def policy(section: PpoSection, x: Outputs, b: TensorBatch) -> LossOutput:
    return PPO(section).objectives()[Role.POLICY](x, b)


def critic(section: PpoSection, x: Outputs, b: TensorBatch) -> LossOutput:
    return PPO(section).objectives()[Role.CRITIC](x, b)


@section
def test_policy_loss_is_the_papers(section: PpoSection) -> None:
    x, b = outputs(), micro_batch()
    assert policy(section, x, b).loss.item() == pytest.approx(policy_loss_by_definition(section, x, b), rel=1e-6)


@section
def test_float32_agrees_with_float64(section: PpoSection) -> None:
    exact = policy(section, outputs(), micro_batch()).loss.item()
    got = policy(section, outputs(torch.float32), micro_batch(torch.float32)).loss
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(exact, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", sorted(SECTIONS.keys() - {"k2 in the loss"}))
def test_policy_gradient_by_finite_differences(name: str) -> None:
    """All but k2, whose loss holds its ratio fixed: its gradient is checked where the KL's exact one is known."""
    section = SECTIONS[name]
    x, b = outputs(), micro_batch()
    policy(section, x, b).loss.backward()
    assert x.predictions.grad is not None
    h = 1e-6
    for t in range(len(MASK)):
        sides = []
        for step in (h, -h):
            moved = x.predictions.detach().clone()
            moved[t] += step
            sides.append(policy(section, Outputs(predictions=moved, entropy=x.entropy), b).loss.item())
        assert x.predictions.grad[t].item() == pytest.approx((sides[0] - sides[1]) / (2 * h), abs=1e-6)


def test_entropy_is_pushed_up() -> None:
    x, b = outputs(), micro_batch()
    assert x.entropy is not None
    policy(PpoSection(entropy_coef=0.1), x, b).loss.backward()
    assert x.entropy.grad is not None
    assert x.entropy.grad.tolist() == pytest.approx([-0.1 * m / sum(MASK) for m in MASK], rel=1e-6)


@pytest.mark.parametrize("value_clip", [0.0, 0.5])
def test_value_loss_is_the_papers(value_clip: float) -> None:
    x, b = outputs(), micro_batch()
    total = 0.0
    for t in range(len(MASK)):
        if MASK[t]:
            v, old, target = (
                float(c[t]) for c in (x.predictions.detach(), b.signals[Signal.VALUES], b.signals[Signal.RETURNS])
            )
            clipped = min(max(v, old - value_clip), old + value_clip) if value_clip else v
            total += max((v - target) ** 2, (clipped - target) ** 2) / 2 / sum(MASK)
    assert critic(PpoSection(value_clip=value_clip), x, b).loss.item() == pytest.approx(total, rel=1e-6)


@section
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_positions_may_hold_anything(section: PpoSection, poison: float) -> None:
    clean = outputs()
    mask = torch.tensor(MASK)
    dirty = Outputs(
        predictions=clean.predictions.detach().where(mask, poison).requires_grad_(),
        entropy=None if clean.entropy is None else clean.entropy.detach().where(mask, poison).requires_grad_(),
    )
    for objective in (policy, critic):
        expected, got = objective(section, clean, micro_batch()), objective(section, dirty, micro_batch(poison=poison))
        assert got.loss.item() == expected.loss.item()
        assert got.metrics == expected.metrics
        got.loss.backward()
        assert dirty.predictions.grad is not None
        assert dirty.predictions.grad.isfinite().all()
        assert (dirty.predictions.grad[~mask] == 0.0).all()


@section
def test_the_first_update_has_ratio_exactly_1(section: PpoSection) -> None:
    b, x = micro_batch(torch.float32), outputs(torch.float32)
    got = policy(section, replace_predictions(x, b.signals[Signal.OLD_LOG_PROBS]), b).metrics
    assert got.maxima["policy/ratio_max"] == 1.0
    assert got.sums["policy/ratio"] == pytest.approx(1.0, rel=1e-6)
    assert got.sums["policy/approx_kl"] == 0.0
    assert got.sums["policy/clipped_low"] == got.sums["policy/clipped_high"] == got.sums["policy/clip_frac"] == 0.0


def replace_predictions(x: Outputs, predictions: torch.Tensor) -> Outputs:
    return replace(x, predictions=predictions.clone().requires_grad_())


def test_clip_fractions_count_what_the_clip_held_back() -> None:
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.0])
    b = tensor_batch(
        [True] * 5, [5], old_log_probs=torch.zeros(5), advantages=torch.tensor([-1.0, 1.0, 1.0, -1.0, 1.0])
    )
    got = policy(PpoSection(), Outputs(predictions=ratio.log(), entropy=torch.zeros(5)), b).metrics
    assert got.sums["policy/clipped_low"] == got.sums["policy/clipped_high"] == pytest.approx(0.2)
    assert got.sums["policy/clip_frac"] == pytest.approx(0.4)
    assert got.maxima["policy/ratio_max"] == pytest.approx(1.5)


@pytest.mark.parametrize("log_ratio", [-100.0, 100.0])
@section
def test_far_policies_stay_finite(section: PpoSection, log_ratio: float) -> None:
    b = micro_batch(torch.float32)
    x = replace_predictions(outputs(torch.float32), b.signals[Signal.OLD_LOG_PROBS] + log_ratio)
    got = policy(section, x, b)
    got.loss.backward()
    assert got.loss.isfinite()
    assert x.predictions.grad is not None
    assert x.predictions.grad.isfinite().all()
    assert all(math.isfinite(value) for value in got.metrics.sums.values())


@pytest.mark.parametrize("missing", ["old_log_probs", "advantages"])
def test_a_missing_column_is_named(missing: str) -> None:
    columns = {"old_log_probs": torch.zeros(1), "advantages": torch.zeros(1)}
    del columns[missing]
    x = Outputs(predictions=torch.zeros(1), entropy=torch.zeros(1))
    with pytest.raises(ValueError, match=missing):
        policy(PpoSection(), x, tensor_batch([True], [1], **columns))  # type: ignore[arg-type]


def test_a_batch_that_forgot_the_coefficients_is_no_silent_0() -> None:
    b = replace(micro_batch(), coefficients={})
    with pytest.raises(KeyError):
        policy(PpoSection(kl_placement="loss"), outputs(), b)


def experience(n: int, rng: np.random.Generator) -> Experience:
    def column() -> np.ndarray:
        return rng.normal(scale=0.3, size=n).astype(np.float32)

    mask = rng.random(n) < 0.7
    mask[:1] = False
    sequence = LearnedSequence(
        token_ids=np.arange(n),
        loss_mask=mask,
        signals={Signal(name): column() for name in (*COLUMNS, "sampler_log_probs")},
    )
    return Experience(id=str(n), sequences=(sequence,), coefficients=COEFFICIENTS)


def step_gradient(
    section: PpoSection, role: str, experiences: list[Experience], limits: MicroBatchLimits
) -> tuple[torch.Tensor, Mapping[str, float]]:
    """Gradient by every token's prediction, and figures, of one optimizer step split by `limits`."""
    plan = plan_batches(experiences, limits)
    starts = np.cumsum([0, *(len(e.sequences[0].token_ids) for e in experiences)])
    weights = torch.randn(int(starts[-1]), generator=torch.Generator().manual_seed(0)) * 0.3
    weights.requires_grad_()
    metrics = Metrics()
    assert len(pack_tokens(plan, experiences)) == len(plan.micro_batches)
    for members, batch in zip(plan.micro_batches, build_batches(plan, experiences, role), strict=True):
        if batch.is_padding:
            continue
        rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in members])
        x = Outputs(predictions=weights[rows], entropy=weights[rows].square())
        got = PPO(section).objectives()[role](x, TensorBatch.from_numpy(batch, torch.device("cpu")))
        got.loss.backward()
        metrics += got.metrics
    assert weights.grad is not None
    return weights.grad, metrics.sums


@section
@pytest.mark.parametrize("role", [Role.POLICY, Role.CRITIC, "ptx"])
@pytest.mark.parametrize(("num_ranks", "max_tokens", "max_examples"), [(1, 1, 1), (2, 20, None), (3, 64, 2)])
def test_the_gradient_does_not_depend_on_the_split(
    section: PpoSection, role: str, num_ranks: int, max_tokens: int, max_examples: int | None
) -> None:
    rng = np.random.default_rng(3)
    experiences = [experience(n, rng) for n in (7, 1, 12, 2, 30, 9, 9)]
    section = section.model_copy(update={"ptx_coef": 0.05})
    whole, figures = step_gradient(
        section, role, experiences, MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=10_000)
    )
    limits = MicroBatchLimits(num_ranks=num_ranks, max_tokens_per_micro_batch=max_tokens, micro_batch_size=max_examples)
    split, split_figures = step_gradient(section, role, experiences, limits)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-8)
    assert split_figures == pytest.approx(figures, rel=1e-5, abs=1e-7)
    assert whole.abs().sum() > 0
