"""KTO: mismatched answers, z0, class weights, the loss, and that none of them depends on how a step is split."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.algorithms.base import Outputs, TensorBatch
from rlhf.algorithms.kto import KTO, balance, describe_labels, kto
from rlhf.algorithms.mismatched_responses import mismatch
from rlhf.config.algo import KtoSection
from rlhf.errors import NumericsError
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, plan_batches
from rlhf.types import Example, Experience, FinishReason, Head, Metrics, Prompt, Role, ScoredGroup, Signal, Signals
from tests.unit.algorithms.build import group, rollout

BETA = 0.5
SECTION = KtoSection(beta=BETA, class_weights="given")


def answer(number: int, good: bool, *, length: int = 2, prompt: Sequence[int] | None = None) -> ScoredGroup:
    """Answer `number`, to a prompt of its own or a given one."""
    made = group([rollout([number] * length, name=f"a{number}")], [float(good)], labels=[good], name=f"p{number}")
    token_ids = np.array([100 + number, 1] if prompt is None else prompt, dtype=np.int64)
    return replace(made, prompt=Prompt(id=f"p{number}", token_ids=token_ids, text="?"))


def signals_of(examples: Sequence[Example], seed: int = 0) -> list[Signals]:
    """Random log-probs by both models; NaN wherever nothing is learned from."""
    rng = np.random.default_rng(seed)

    def said(example: Example) -> tuple[np.ndarray, ...]:
        return tuple(
            np.where(s.loss_mask, rng.normal(-2.0, 0.5, len(s)), np.nan).astype(np.float32) for s in example.sequences
        )

    return [{Signal.OLD_LOG_PROBS: said(example), Signal.REF_LOG_PROBS: said(example)} for example in examples]


def own_ratio(example: Example, signal: Signals, index: int = 0) -> float:
    """log(policy / reference) by definition, in float64."""
    mask = example.sequences[index].loss_mask
    old, ref = (
        arrays[index][mask].astype(np.float64)
        for arrays in (signal[Signal.OLD_LOG_PROBS], signal[Signal.REF_LOG_PROBS])
    )
    return float((old - ref).sum())


def loss_of_step(
    algorithm: KTO,
    experiences: Sequence[Experience],
    log_probs: Sequence[torch.Tensor],
    limits: MicroBatchLimits | None = None,
) -> tuple[torch.Tensor, Metrics]:
    """The step's loss, summed over the micro-batches of a plan; `log_probs[i]` are those of experience i."""
    plan = plan_batches(experiences, limits or MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=10_000))
    total, metrics = torch.zeros((), dtype=torch.float64), Metrics()
    for members, batch in zip(plan.micro_batches, build_batches(plan, experiences, Role.POLICY), strict=True):
        if batch.is_padding:
            continue
        said = torch.cat([log_probs[i] for i in members])
        outputs = Outputs(predictions=said, entropy=torch.full_like(said, 2.0).detach())
        got = algorithm.objectives()[Role.POLICY](outputs, TensorBatch.from_numpy(batch, torch.device("cpu")))
        total, metrics = total + got.loss, metrics + got.metrics
    return total, metrics


def as_before(signals: Sequence[Signals]) -> list[torch.Tensor]:
    """The policy's log-probs of the answers themselves, as it said before the step: leaves with a gradient."""
    return [torch.tensor(s[Signal.OLD_LOG_PROBS][0], dtype=torch.float64, requires_grad=True) for s in signals]


def test_needs() -> None:
    needs = KTO(SECTION).needs
    assert needs.trains == {Role.POLICY: Head.LOG_PROBS}
    assert needs.signals == {"old_log_probs", "ref_log_probs"}
    assert not needs.online


@pytest.mark.parametrize(
    ("log_ratio", "good", "z0", "expected"),
    [
        (0.0, True, 0.0, 0.5),
        (0.0, False, 0.0, 0.5),
        (3.0, True, 1.0, 1 - 1 / (1 + math.exp(-1.0))),
        (3.0, False, 1.0, 1 - 1 / (1 + math.exp(1.0))),
        (-4.0, True, 0.5, 1 - 1 / (1 + math.exp(2.25))),
        (1e6, True, 0.0, 0.0),
        (1e6, False, 0.0, 1.0),
        (-1e6, True, 0.0, 1.0),
    ],
)
def test_golden_losses(log_ratio: float, good: bool, z0: float, expected: float) -> None:
    """By hand, beta 0.5. beta is applied once."""
    (loss,) = kto(torch.tensor([log_ratio]), torch.tensor([good]), z0=z0, beta=BETA).tolist()
    assert loss == pytest.approx(expected, abs=1e-6)


def test_a_whole_step_by_hand() -> None:
    """Two answers of one token, log-ratios 1 and -1, mismatched 3 and -1: z0 = 1."""
    algorithm = KTO(replace_weights(2.0, 3.0))
    examples = algorithm.select([answer(1, True, length=1), answer(2, False, length=1)])
    assert [[s.token_ids.tolist() for s in e.sequences] for e in examples] == [
        [[101, 1, 1], [101, 1, 2]],
        [[102, 1, 2], [102, 1, 1]],
    ]
    nan = math.nan

    def said(own: float, other: float) -> Signals:
        return {
            Signal.OLD_LOG_PROBS: (
                np.array([nan, nan, own - 5], np.float32),
                np.array([nan, nan, other - 5], np.float32),
            ),
            Signal.REF_LOG_PROBS: (np.array([nan, nan, -5], np.float32), np.array([nan, nan, -5], np.float32)),
        }

    signals = [said(1.0, 3.0), said(-1.0, -1.0)]
    experiences, credited = algorithm.credit(examples, signals)
    assert credited.sums["kto/z0"] == 1.0
    assert credited.sums["kto/mismatched"] == 2.0
    loss, metrics = loss_of_step(algorithm, experiences, as_before(signals))
    good, bad = 0.5, 1 - 1 / (1 + math.exp(-1.0))  # beta * (1 - 1) = 0; beta * (1 - -1) = 1
    assert loss.item() == pytest.approx((2 * good + 3 * bad) / 2)
    assert metrics.sums["policy/loss"] == pytest.approx(loss.item())
    assert metrics.sums["policy/entropy"] == pytest.approx(2.0)
    assert credited.sums["kto/loss"] == pytest.approx(loss.item())
    expected = {
        "labels/desirable": 0.5,
        "labels/one_sided": 0.0,
        "labels/desirable_reward": 0.5,
        "labels/undesirable_reward": -0.5,
        "labels/margin": 1.0,
        "labels/auc": 1.0,
        "labels/desirable_log_prob": -4.0,
        "labels/undesirable_log_prob": -6.0,
    }
    assert {name: credited.sums[name] for name in expected} == pytest.approx(expected)


def replace_weights(desirable: float, undesirable: float) -> KtoSection:
    return KtoSection(beta=BETA, class_weights="given", desirable_weight=desirable, undesirable_weight=undesirable)


@given(st.lists(st.integers(0, 4), max_size=24))
def test_mismatched_answers_belong_to_other_prompts(numbers: list[int]) -> None:
    """Wherever there are two prompts; and equally large groups use each answer once."""
    partners = mismatch([bytes([number]) for number in numbers])
    if len(set(numbers)) < 2:
        assert partners == [None] * len(numbers)
        return
    for number, partner in zip(numbers, partners, strict=True):
        assert partner is not None
        assert numbers[partner] != number
    if len({numbers.count(number) for number in numbers}) == 1:
        assert sorted(p for p in partners if p is not None) == list(range(len(numbers)))


def test_groups_of_answers_meet_different_answers() -> None:
    assert mismatch([b"x", b"x", b"y", b"y"]) == [2, 3, 0, 1]
    assert mismatch([b"x", b"y", b"x", b"y", b"x"]) == [1, 0, 3, 2, 1]


def test_one_prompt_under_two_names_is_one_prompt() -> None:
    """A pair that was read as two labels: nothing is mismatched, and z0 is 0."""
    algorithm = KTO(SECTION)
    examples = algorithm.select([answer(1, True, prompt=[7, 7]), answer(2, False, prompt=[7, 7])])
    assert [len(example.sequences) for example in examples] == [1, 1]
    _, credited = algorithm.credit(examples, signals_of(examples))
    assert credited.sums["kto/z0"] == 0.0
    assert credited.sums["kto/mismatched"] == 0.0


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_every_size_has_one_z0(size: int) -> None:
    algorithm = KTO(SECTION)
    examples = algorithm.select([answer(n, n % 2 == 0, length=1 + n % 3) for n in range(size)])
    signals = signals_of(examples)
    experiences, credited = algorithm.credit(examples, signals)
    mismatched = [own_ratio(e, s, 1) for e, s in zip(examples, signals, strict=True) if len(e.sequences) > 1]
    z0 = max(float(np.mean(mismatched)), 0.0) if mismatched else 0.0
    assert len(mismatched) == (size if size > 1 else 0)
    assert credited.sums["kto/z0"] == pytest.approx(z0)
    assert [len(e.sequences) for e in experiences] == [1] * size
    assert all(e.coefficients["z0"] == credited.sums["kto/z0"] for e in experiences)
    loss, _ = loss_of_step(algorithm, experiences, as_before(signals))
    by_hand = [
        1 / (1 + math.exp((1 if e.rewards[0] else -1) * BETA * (own_ratio(e, s) - z0)))
        for e, s in zip(examples, signals, strict=True)
    ]
    assert loss.item() == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert loss.item() == pytest.approx(credited.sums["kto/loss"], rel=1e-5)


def test_z0_is_not_negative() -> None:
    algorithm = KTO(SECTION)
    examples = algorithm.select([answer(n, True) for n in range(4)])
    signals = [
        {**s, Signal.REF_LOG_PROBS: tuple(old + 1 for old in s[Signal.OLD_LOG_PROBS])} for s in signals_of(examples)
    ]
    assert algorithm.credit(examples, signals)[1].sums["kto/z0"] == 0.0
    signals = [{**s, Signal.REF_LOG_PROBS: tuple(old - 1 for old in s[Signal.OLD_LOG_PROBS])} for s in signals]
    assert algorithm.credit(examples, signals)[1].sums["kto/z0"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    "limits",
    [
        MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=1),
        MicroBatchLimits(num_ranks=3, max_tokens_per_micro_batch=8),
        MicroBatchLimits(num_ranks=4, max_tokens_per_micro_batch=9_999),
    ],
)
def test_neither_loss_nor_gradient_depends_on_the_split(limits: MicroBatchLimits) -> None:
    algorithm = KTO(replace_weights(1.5, 0.5))
    examples = algorithm.select([answer(n, n % 3 == 0, length=1 + n % 4) for n in range(7)])
    signals = signals_of(examples)
    experiences, _ = algorithm.credit(examples, signals)
    results = []
    for plan in (None, limits):
        leaves = as_before(signals)
        loss, metrics = loss_of_step(algorithm, experiences, leaves, plan)
        loss.backward()
        results.append((loss.item(), [leaf.grad for leaf in leaves], metrics))
    (whole, gradient, figures), (split, split_gradient, split_figures) = results
    assert split == pytest.approx(whole, abs=1e-12)
    for one, other in zip(gradient, split_gradient, strict=True):
        assert one is not None
        torch.testing.assert_close(other, one)
        assert not one.isnan().any()
    assert split_figures.sums == pytest.approx(figures.sums)


def test_the_gradient_is_the_loss_s_own_with_z0_constant() -> None:
    """By finite differences in float64: z0 stays where it is while the policy moves."""
    algorithm = KTO(replace_weights(2.0, 0.7))
    examples = algorithm.select([answer(n, n % 2 == 0, length=1 + n) for n in range(4)])
    signals = [
        {**s, Signal.REF_LOG_PROBS: tuple(ref - 0.4 for ref in s[Signal.REF_LOG_PROBS])} for s in signals_of(examples)
    ]
    experiences, credited = algorithm.credit(examples, signals)
    assert credited.sums["kto/z0"] > 0.1
    leaves = [torch.nan_to_num(leaf.detach()).requires_grad_() for leaf in as_before(signals)]
    assert torch.autograd.gradcheck(
        lambda *said: loss_of_step(algorithm, experiences, said)[0], leaves, eps=1e-6, atol=1e-7
    )


def test_humanline_clamps_each_token() -> None:
    """Log-ratios 3 and -0.5 a token, clamped to 1.5 and -0.5: in loss and z0, without gradient where clamped."""
    algorithm = KTO(KtoSection(beta=BETA, class_weights="given", humanline=True))
    examples = algorithm.select([answer(1, True), answer(2, False)])

    def said(gap: float) -> tuple[np.ndarray, ...]:
        return tuple(np.where(s.loss_mask, [0, 0, gap, -0.5], np.nan).astype(np.float32) for s in examples[0].sequences)

    signals = [
        {Signal.OLD_LOG_PROBS: said(gap), Signal.REF_LOG_PROBS: (np.zeros(4, np.float32),) * 2} for gap in (3.0, 0.5)
    ]
    experiences, credited = algorithm.credit(examples, signals)
    assert credited.sums["kto/z0"] == pytest.approx((1.0 + 0.0) / 2)
    assert credited.sums["labels/desirable_reward"] == pytest.approx(BETA * 1.0)
    leaves = as_before(signals)
    loss, _ = loss_of_step(algorithm, experiences, leaves)
    assert loss.item() == pytest.approx(credited.sums["kto/loss"], rel=1e-6)
    loss.backward()
    assert leaves[0].grad is not None
    assert leaves[0].grad[2] == 0.0
    assert leaves[0].grad[3] < 0.0


def test_the_signs_of_the_gradient() -> None:
    """Good answers go up, bad ones down, prompts nowhere."""
    algorithm = KTO(SECTION)
    examples = algorithm.select([answer(1, True), answer(2, False)])
    signals = signals_of(examples)
    leaves = as_before(signals)
    loss_of_step(algorithm, algorithm.credit(examples, signals)[0], leaves)[0].backward()
    good, bad = (leaf.grad for leaf in leaves)
    assert good is not None
    assert bad is not None
    assert good[:2].tolist() == bad[:2].tolist() == [0.0, 0.0]
    assert (good[2:] < 0).all()
    assert (bad[2:] > 0).all()


def test_a_step_of_one_label_is_learned_from() -> None:
    """Each answer has a loss of its own; figures of the label that is not there are left out."""
    algorithm = KTO(KtoSection(beta=BETA))
    examples = algorithm.select([answer(n, True) for n in range(3)])
    signals = signals_of(examples)
    experiences, credited = algorithm.credit(examples, signals)
    assert [e.targets for e in experiences] == [(1.0,)] * 3
    assert credited.sums["labels/one_sided"] == 1.0
    assert credited.sums["kto/desirable_weight"] == 1.0
    assert not {"labels/undesirable_reward", "labels/margin", "labels/auc"} & set(credited.sums)
    leaves = as_before(signals)
    loss_of_step(algorithm, experiences, leaves)[0].backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves)


def test_answers_without_tokens_are_left_out() -> None:
    """Neither learned from, nor anybody's mismatched answer."""
    algorithm = KTO(SECTION)
    empty, aborted = answer(1, True, length=0), answer(2, True)
    aborted = replace(
        aborted, responses=tuple(replace(r, finish_reason=FinishReason.ABORTED) for r in aborted.responses)
    )
    groups = [empty, aborted, answer(3, False), answer(4, True)]
    assert [algorithm.keep(g) for g in groups] == [False, False, True, True]
    examples = algorithm.select(groups)
    assert [e.id for e in examples] == ["a3", "a4"]
    assert [e.sequences[1].token_ids[-1] for e in examples] == [4, 3]
    assert algorithm.select([empty, aborted]) == []


def test_a_mismatched_answer_never_exceeds_the_longest_sequence() -> None:
    """A long prompt beside a long answer: the answer's tail is cut; where nothing is left of it, it is not counted."""
    algorithm = KTO(SECTION)
    groups = [answer(1, True, length=6), answer(2, False, length=1, prompt=[9] * 7)]
    first, second = algorithm.select(groups)
    assert len(first.sequences[1]) == 3
    assert second.sequences[1].token_ids.tolist() == [9] * 7 + [1]
    assert second.sequences[1].loss_mask.tolist() == [False] * 7 + [True]
    late = replace(groups[0], responses=(rollout([1] * 6, name="a1", loss_mask=[False] * 5 + [True]),))
    examples = algorithm.select([late, groups[1]])
    assert not examples[1].sequences[1].loss_mask.any()
    signals = [
        {**s, Signal.REF_LOG_PROBS: tuple(old - 1 for old in s[Signal.OLD_LOG_PROBS])} for s in signals_of(examples)
    ]
    _, credited = algorithm.credit(examples, signals)
    assert credited.sums["kto/mismatched"] == 1.0
    assert credited.sums["kto/z0"] == pytest.approx(1.0)


def test_weights_that_make_labels_count_the_same() -> None:
    assert balance(10, 30) == (3.0, 1.0)
    assert balance(9, 6) == (1.0, 1.5)
    assert balance(5, 5) == (1.0, 1.0)
    assert balance(0, 5) == balance(5, 0) == balance(0, 0) == (1.0, 1.0)


def test_auto_weights_without_a_data_set_are_of_the_step() -> None:
    algorithm = KTO(KtoSection())
    examples = algorithm.select([answer(n, n == 0) for n in range(4)])
    experiences, credited = algorithm.credit(examples, signals_of(examples))
    assert (credited.sums["kto/desirable_weight"], credited.sums["kto/undesirable_weight"]) == (3.0, 1.0)
    assert experiences[2].coefficients["desirable"] == 3.0


def test_a_number_that_is_not_finite_has_a_name() -> None:
    algorithm = KTO(SECTION)
    examples = algorithm.select([answer(1, True), answer(2, False)])
    signals = signals_of(examples)
    signals[1][Signal.REF_LOG_PROBS][1][-1] = np.inf
    with pytest.raises(NumericsError, match="a2: ref_log_probs: 1 of 2 tokens"):
        algorithm.credit(examples, signals)


def test_equal_rewards_count_half() -> None:
    labels = np.array([True, False, False])
    assert describe_labels(labels, np.zeros(3), np.zeros(3))["labels/auc"] == 0.5
    assert describe_labels(labels, np.array([1.0, 1.0, 2.0]), np.zeros(3))["labels/auc"] == 0.25


def test_it_remembers_nothing() -> None:
    algorithm = KTO(SECTION)
    algorithm.restore(algorithm.state())
    assert algorithm.state() == {}
    assert algorithm.after_pass(Metrics())
