"""The critic-free losses against a float64 implementation written from the papers, token by token; with TRL's own they
are compared in tests/integration/test_trl_losses.py."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.algorithms import build_algorithm
from rlhf.algorithms.base import LossOutput, Outputs, TensorBatch
from rlhf.algorithms.policy_loss import RATIOS, Cispo, Clip, PolicyTokens
from rlhf.config.algo import (
    CispoSection,
    CriticFreeSection,
    DapoSection,
    DrGrpoSection,
    FixedKl,
    GrpoSection,
    GspoSection,
    ReinforceBaselineSection,
    RlooSection,
)
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, plan_batches
from rlhf.types import Experience, LearnedSequence, Metrics, Role, Signal
from tests.unit.algorithms.build import tensor_batch

LENGTHS = [5, 1, 0, 3, 4]
MASK = [False, True, True, False, True] + [False] + [False, True, True] + [False] * 4
"""A gap inside (a tool's token), a single token, nothing, an odd one, and one without tokens to learn."""
KL = 0.3
MEAN = "seq-mean-token-mean"

SECTIONS: dict[str, CriticFreeSection] = {
    "grpo": GrpoSection(),
    "grpo with kl": GrpoSection(kl=FixedKl(coef=KL), aggregation=MEAN, entropy_coef=0.1),
    "r1": GrpoSection(ratio="sequence", aggregation=MEAN),
    "dual clip": GrpoSection(dual_clip=1.3),
    "humanline": GrpoSection(humanline=True, humanline_low=-0.1, humanline_high=0.15),
    "humanline, whole response": GrpoSection(humanline=True, humanline_high=0.1, ratio="sequence", aggregation=MEAN),
    "dapo": DapoSection(),
    "dr-grpo": DrGrpoSection(aggregation_tokens=7),
    "rloo": RlooSection(aggregation_tokens=7),
    "kl in the reward alone": RlooSection(aggregation_tokens=7, kl_estimator="k3"),
    "reinforce++-baseline": ReinforceBaselineSection(kl=FixedKl(coef=KL)),
    "gspo": GspoSection(),
    "gspo, wide": GspoSection(clip_low=0.2, clip_high=0.3),
    "cispo": CispoSection(),
    "cispo, clipped below too": CispoSection(clip_low=0.1, clip_high=0.1),
}
HELD_FIXED = {"cispo", "cispo, clipped below too", "reinforce++-baseline"}
"""Their losses hold a ratio fixed: their gradient is not that of their value."""
section = pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS.keys())


def numbers(seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(len(MASK), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def micro_batch(dtype: torch.dtype = torch.float64, poison: float = 0.0) -> TensorBatch:
    """A batch of random columns; what is not learned from holds `poison`."""
    columns = {
        "old_log_probs": -1.0 + numbers(1, 0.3),
        "ref_log_probs": -1.0 + numbers(2, 0.3),
        "advantages": numbers(3),
    }
    poisoned = {name: column.where(torch.tensor(MASK), poison).to(dtype) for name, column in columns.items()}
    return tensor_batch(MASK, LENGTHS, coefficients={"kl": KL}, **poisoned)  # type: ignore[arg-type]


def outputs(dtype: torch.dtype = torch.float64) -> Outputs:
    predictions = (-1.0 + numbers(6, 0.3)).to(dtype).requires_grad_()
    return Outputs(predictions=predictions, entropy=numbers(7).abs().to(dtype).requires_grad_())


def policy(section: CriticFreeSection, x: Outputs, b: TensorBatch) -> LossOutput:
    return build_algorithm(section).objectives()[Role.POLICY](x, b)


def answers() -> list[list[int]]:
    """The tokens of each answer that are learned from."""
    spans = [(sum(LENGTHS[:i]), sum(LENGTHS[: i + 1])) for i in range(len(LENGTHS))]
    return [tokens for start, end in spans if (tokens := [t for t in range(start, end) if MASK[t]])]


def ratio_by_definition(section: CriticFreeSection, gaps: list[float], i: int) -> float:
    """`gaps`: log(policy / old) of the answer's tokens."""
    low, high = section.log_ratio_limits or (-math.inf, math.inf)
    gaps = [min(max(gap, low), high) for gap in gaps]
    match section.ratio:
        case "token":
            return math.exp(gaps[i])
        case "sequence":
            return math.prod(math.exp(gap) for gap in gaps)
        case _:
            return math.prod(math.exp(gap) for gap in gaps) ** (1 / len(gaps))


def surrogate_by_definition(section: CriticFreeSection, ratio: float, advantage: float, log_prob: float) -> float:
    clipped = min(max(ratio, 1 - section.clip_low), 1 + section.clip_high)
    if section.loss == "cispo":
        return -clipped * advantage * log_prob
    worth = min(ratio * advantage, clipped * advantage)
    if section.dual_clip and advantage < 0:
        worth = max(worth, section.dual_clip * advantage)
    return -worth


def loss_by_definition(section: CriticFreeSection, x: Outputs, b: TensorBatch) -> float:
    """Plain floats, one token after another."""
    assert x.entropy is not None
    predictions, entropy = x.predictions.detach().tolist(), x.entropy.detach().tolist()
    old, ref = b.signals[Signal.OLD_LOG_PROBS].tolist(), b.signals[Signal.REF_LOG_PROBS].tolist()
    total, num_tokens = 0.0, sum(MASK)
    for tokens in answers():
        gaps = [predictions[t] - old[t] for t in tokens]
        for i, t in enumerate(tokens):
            ratio = ratio_by_definition(section, gaps, i)
            loss = surrogate_by_definition(section, ratio, float(b.signals[Signal.ADVANTAGES][t]), predictions[t])
            loss -= section.entropy_coef * entropy[t]
            if section.uses_reference and section.kl_placement == "loss":
                d = predictions[t] - ref[t]
                loss += KL * math.exp(gaps[i]) * (d**2 / 2 if section.kl_estimator == "k2" else math.exp(-d) - 1 + d)
            match section.aggregation:
                case "token-mean":
                    total += loss / num_tokens
                case "seq-mean-token-mean":
                    total += loss / len(tokens) / len(answers())
                case _:
                    assert section.aggregation_tokens is not None
                    total += loss / section.aggregation_tokens / len(answers())
    return total


@section
def test_the_loss_is_the_papers(section: CriticFreeSection) -> None:
    x, b = outputs(), micro_batch()
    assert policy(section, x, b).loss.item() == pytest.approx(loss_by_definition(section, x, b), rel=1e-6)


@section
def test_float32_agrees_with_float64(section: CriticFreeSection) -> None:
    exact = policy(section, outputs(), micro_batch()).loss.item()
    got = policy(section, outputs(torch.float32), micro_batch(torch.float32)).loss
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(exact, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", sorted(SECTIONS.keys() - HELD_FIXED))
def test_the_gradient_by_finite_differences(name: str) -> None:
    x, b, h = outputs(), micro_batch(), 1e-6
    policy(SECTIONS[name], x, b).loss.backward()
    assert x.predictions.grad is not None
    for t in range(len(MASK)):
        sides = []
        for step in (h, -h):
            moved = x.predictions.detach().clone()
            moved[t] += step
            sides.append(policy(SECTIONS[name], replace(x, predictions=moved), b).loss.item())
        assert x.predictions.grad[t].item() == pytest.approx((sides[0] - sides[1]) / (2 * h), abs=1e-6)
    assert (x.predictions.grad != 0.0).any()


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.2), (0.1, 0.1)])
def test_the_gradient_of_cispo_is_the_clipped_ratio_times_the_advantage(low: float, high: float) -> None:
    """On every token, also on those that PPO's clip would silence."""
    x, b = outputs(), micro_batch()
    policy(CispoSection(clip_low=low, clip_high=high), x, b).loss.backward()
    weight = (x.predictions.detach() - b.signals[Signal.OLD_LOG_PROBS]).exp().clamp(1 - low, 1 + high)
    expected = torch.where(torch.tensor(MASK), -weight * b.signals[Signal.ADVANTAGES] / sum(MASK), 0.0)
    torch.testing.assert_close(x.predictions.grad, expected)
    assert (expected[torch.tensor(MASK)] != 0).all()


@pytest.mark.parametrize("ratio", [0.3, 1.5, 3.0])
@pytest.mark.parametrize("advantage", [-2.0, 2.0])
def test_clips_by_hand(ratio: float, advantage: float) -> None:
    """Clip at 0.8 and 1.2, dual clip 2, with an advantage of magnitude 2."""
    one = torch.tensor([ratio], dtype=torch.float64).log()
    tokens = PolicyTokens(
        log_probs=one, log_ratio=one, advantages=torch.tensor([advantage], dtype=torch.float64), coefficients={}
    )
    clip = {(0.3, -2.0): 1.6, (1.5, -2.0): 3.0, (3.0, -2.0): 6.0, (0.3, 2.0): -0.6}.get((ratio, advantage), -2.4)
    dual = 4.0 if (ratio, advantage) == (3.0, -2.0) else clip
    assert Clip(0.2, 0.2).loss(tokens).item() == pytest.approx(clip)
    assert Clip(0.2, 0.2, 2.0).loss(tokens).item() == pytest.approx(dual)
    weight = {0.3: 0.3, 1.5: 1.2, 3.0: 1.2}[ratio]
    assert Cispo(1.0, 0.2).loss(tokens).item() == pytest.approx(-weight * advantage * math.log(ratio))
    low, high = Clip(0.2, 0.2).clipped(tokens)
    assert (low.item(), high.item()) == (ratio < 0.8 and advantage < 0, ratio > 1.2 and advantage > 0)
    low, high = Cispo(1.0, 0.2).clipped(tokens)
    assert (low.item(), high.item()) == (False, ratio > 1.2)


@pytest.mark.parametrize("advantage", [-0.5, 0.0, 0.5])
def test_a_clip_acts_by_the_sign_of_an_advantage(advantage: float) -> None:
    """However small it is; without an advantage nothing is held back."""
    log_ratio = torch.tensor([0.3, 3.0], dtype=torch.float64).log()
    advantages = torch.full_like(log_ratio, advantage)
    tokens = PolicyTokens(log_probs=log_ratio, log_ratio=log_ratio, advantages=advantages, coefficients={})
    low, high = Clip(0.2, 0.2).clipped(tokens)
    assert (low.tolist(), high.tolist()) == ([advantage < 0, False], [False, advantage > 0])


def test_ratios_by_hand() -> None:
    """Two tokens of 2 and 8, a gap between them; one of 3; none. The geometric mean of 2 and 8 is 4."""
    batch = tensor_batch([True, False, True, True, False], [3, 1, 0, 1])
    log_ratio = torch.tensor([2.0, 1.0, 8.0, 3.0, 1.0]).log()

    def ratio(kind: str) -> list[float]:
        got: list[float] = RATIOS[kind](log_ratio, batch).exp().tolist()  # type: ignore[index]
        return got

    assert ratio("token") == pytest.approx([2.0, 1.0, 8.0, 3.0, 1.0])
    assert ratio("sequence") == pytest.approx([16.0, 1.0, 16.0, 3.0, 1.0])
    assert ratio("sequence-mean") == pytest.approx([4.0, 1.0, 4.0, 3.0, 1.0])


def test_gspo_teaches_all_tokens_of_an_answer_alike() -> None:
    """d/d lp_t of -s * A with s = exp(mean(lp - old)) is -s * A / n, whatever the token's own ratio."""
    old = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    x = (old + torch.tensor([0.1, -0.05, 0.02], dtype=torch.float64)).requires_grad_()
    b = tensor_batch([True] * 3, [3], old_log_probs=old, advantages=torch.full((3,), 2.0, dtype=torch.float64))
    policy(GspoSection(clip_high=0.5, clip_low=0.5), Outputs(predictions=x, entropy=torch.zeros(3)), b).loss.backward()
    assert x.grad is not None
    assert x.grad.tolist() == pytest.approx([-math.exp(0.07 / 3) * 2.0 / 3] * 3)


@section
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_positions_may_hold_anything(section: CriticFreeSection, poison: float) -> None:
    clean, mask = outputs(), torch.tensor(MASK)
    assert clean.entropy is not None
    dirty = Outputs(
        predictions=clean.predictions.detach().where(mask, poison).requires_grad_(),
        entropy=clean.entropy.detach().where(mask, poison).requires_grad_(),
    )
    expected, got = policy(section, clean, micro_batch()), policy(section, dirty, micro_batch(poison=poison))
    assert got.loss.item() == expected.loss.item()
    assert got.metrics == expected.metrics
    got.loss.backward()
    assert dirty.predictions.grad is not None
    assert dirty.predictions.grad.isfinite().all()
    assert (dirty.predictions.grad[~mask] == 0.0).all()


@section
def test_the_first_update_has_ratio_exactly_1(section: CriticFreeSection) -> None:
    b, x = micro_batch(torch.float32), outputs(torch.float32)
    got = policy(section, replace(x, predictions=b.signals[Signal.OLD_LOG_PROBS].clone().requires_grad_()), b).metrics
    assert got.maxima["policy/ratio_max"] == 1.0
    assert got.sums["policy/ratio"] == pytest.approx(1.0, rel=1e-6)
    assert got.sums["policy/approx_kl"] == got.sums["policy/clipped_low"] == got.sums["policy/clipped_high"] == 0.0


@section
@pytest.mark.parametrize("log_ratio", [-100.0, 100.0])
def test_far_policies_stay_finite(section: CriticFreeSection, log_ratio: float) -> None:
    b, x = micro_batch(torch.float32), outputs(torch.float32)
    far = (b.signals[Signal.OLD_LOG_PROBS] + log_ratio).clone().requires_grad_()
    got = policy(section, replace(x, predictions=far), b)
    got.loss.backward()
    assert got.loss.isfinite()
    assert far.grad is not None
    assert far.grad.isfinite().all()
    assert all(math.isfinite(value) for value in got.metrics.sums.values())


@section
def test_a_micro_batch_without_tokens_has_loss_0(section: CriticFreeSection) -> None:
    nothing = torch.zeros(3, requires_grad=True)
    columns = dict.fromkeys(("old_log_probs", "ref_log_probs", "advantages"), torch.zeros(3))
    b = tensor_batch([False] * 3, [2, 1, 0], coefficients={"kl": KL}, **columns)  # type: ignore[arg-type]
    got = policy(section, Outputs(predictions=nothing, entropy=torch.zeros(3)), b)
    got.loss.backward()
    assert got.loss.item() == 0.0
    assert nothing.grad is not None
    assert nothing.grad.tolist() == [0.0] * 3


def experience(n: int, rng: np.random.Generator) -> Experience:
    mask = rng.random(n) < 0.7
    mask[:1] = False
    columns = {
        signal: rng.normal(scale=0.3, size=n).astype(np.float32)
        for signal in (Signal.OLD_LOG_PROBS, Signal.SAMPLER_LOG_PROBS, Signal.REF_LOG_PROBS, Signal.ADVANTAGES)
    }
    sequence = LearnedSequence(token_ids=np.arange(n), loss_mask=mask, signals=columns)
    return Experience(id=str(n), sequences=(sequence,), coefficients={"kl": KL})


def step_gradient(
    section: CriticFreeSection, experiences: list[Experience], limits: MicroBatchLimits
) -> tuple[torch.Tensor, Metrics]:
    """Gradient by every token's prediction, and figures, of one optimizer step split by `limits`."""
    plan = plan_batches(experiences, limits)
    starts = np.cumsum([0, *(len(e.sequences[0].token_ids) for e in experiences)])
    weights = torch.randn(int(starts[-1]), generator=torch.Generator().manual_seed(0)) * 0.3
    weights.requires_grad_()
    metrics = Metrics()
    for members, batch in zip(plan.micro_batches, build_batches(plan, experiences, Role.POLICY), strict=True):
        if batch.is_padding:
            continue
        rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in members])
        x = Outputs(predictions=weights[rows], entropy=weights[rows].square())
        got = policy(section, x, TensorBatch.from_numpy(batch, torch.device("cpu")))
        got.loss.backward()
        metrics += got.metrics
    assert weights.grad is not None
    return weights.grad, metrics


@section
@pytest.mark.parametrize(("num_ranks", "max_tokens", "max_examples"), [(1, 1, 1), (2, 20, None), (3, 64, 2)])
def test_the_gradient_does_not_depend_on_the_split(
    section: CriticFreeSection, num_ranks: int, max_tokens: int, max_examples: int | None
) -> None:
    rng = np.random.default_rng(3)
    experiences = [experience(n, rng) for n in (7, 1, 12, 2, 30, 9, 9)]
    whole, figures = step_gradient(
        section, experiences, MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=10_000)
    )
    limits = MicroBatchLimits(num_ranks=num_ranks, max_tokens_per_micro_batch=max_tokens, micro_batch_size=max_examples)
    split, split_figures = step_gradient(section, experiences, limits)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-8)
    assert split_figures.sums == pytest.approx(figures.sums, rel=1e-5, abs=1e-7)
    assert whole.abs().sum() > 0
