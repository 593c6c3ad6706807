"""DPO: which answers become pairs, how micro-batches become losses, and what the run is told."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.algorithms.dpo import DPO
from rlhf.algorithms.pairs import PairPicker
from rlhf.algorithms.stuck_loss import PATIENCE_STEPS, StuckLossWatch
from rlhf.config.algo import DpoSection, PairLossSection
from rlhf.config.algo.preference import DpoLoss, IpoLoss, RpoLoss, SimpoLoss
from rlhf.errors import CheckpointError, NumericsError
from rlhf.orchestrator.step.batching import MicroBatchLimits
from rlhf.types import FinishReason, Head, Metrics, Role, ScoredGroup, Signal
from tests.unit.algorithms.build import group, rollout
from tests.unit.algorithms.pair_support import experience, learn, numbers, pair
from tests.unit.algorithms.test_pair_losses import ALL

A, B, C = (rollout([i, i + 1], name=name) for i, name in ((1, "a"), (3, "b"), (5, "c")))
SAME_AS_A = replace(A, id="same as a")


def pick(*groups: ScoredGroup) -> tuple[list[tuple[tuple[float, ...], list[int]]], dict[str, float]]:
    """The pairs' rewards and last tokens, and what was dropped."""
    picker = PairPicker(from_policy=False)
    examples = picker.pick(groups)
    return [(e.rewards, [int(s.token_ids[-1]) for s in e.sequences]) for e in examples], picker.dropped()


@pytest.mark.parametrize("section", ALL, ids=lambda section: section.type)
def test_needs(section: PairLossSection) -> None:
    needs = DPO(DpoSection.model_validate({"loss": section})).needs
    assert needs.trains == {Role.POLICY: Head.LOG_PROBS}
    assert needs.signals == ({"ref_log_probs"} if section.uses_reference else set())
    assert not needs.online


def test_chosen_first_whatever_the_order_of_the_answers() -> None:
    kept, dropped = pick(group([A, B], [1.0, 0.0]), group([A, B], [-3.0, -1.5]))
    assert kept == [((1.0, 0.0), [2, 4]), ((-1.5, -3.0), [4, 2])]
    assert dropped == {"pairs/tied": 0.0, "pairs/identical": 0.0, "pairs/empty": 0.0}


def test_best_against_worst_of_a_ranking() -> None:
    assert pick(group([B, A, C], [1.0, 2.0, 0.0]))[0] == [((2.0, 0.0), [2, 6])]


def test_pairs_that_truncation_made_identical_are_dropped_and_counted() -> None:
    kept, dropped = pick(group([A, SAME_AS_A], [1.0, 0.0]), group([A, B], [1.0, 0.0]))
    assert len(kept) == 1
    assert dropped["pairs/identical"] == 1.0


def test_of_three_answers_two_of_which_are_identical_a_pair_is_left() -> None:
    assert pick(group([A, SAME_AS_A, B], [2.0, 0.0, 1.0]))[0] == [((2.0, 1.0), [2, 4])]


@pytest.mark.parametrize("answers", [[A, B], [A, SAME_AS_A]])
@pytest.mark.parametrize("score", [0.0, 1.0, -0.1, 1e30])
def test_equal_rewards_are_ties_exactly(answers: list[object], score: float) -> None:
    """Nothing is made of rewards that are equal, and everything of rewards that are nearly so."""
    kept, dropped = pick(group(answers, [score, score]))  # type: ignore[arg-type]
    assert not kept
    assert dropped["pairs/tied"] == 1.0
    nearly = float(np.nextafter(score, np.inf))
    assert [rewards for rewards, _ in pick(group([A, B], [score, nearly]))[0]] == [(nearly, score)]


def test_the_only_other_answer_may_tie_with_the_best() -> None:
    kept, dropped = pick(group([A, SAME_AS_A, B], [1.0, 0.0, 1.0]))
    assert not kept
    assert dropped["pairs/tied"] == 1.0


@pytest.mark.parametrize(
    "silent",
    [
        rollout([], name="empty"),
        rollout([7, 8], name="aborted", finish_reason=FinishReason.ABORTED),
        rollout([7, 8], name="not its own", loss_mask=[False, False]),
    ],
)
def test_answers_without_a_token_to_learn_from_are_in_no_pair(silent: object) -> None:
    kept, dropped = pick(
        group([silent, A], [0.0, 1.0]),  # type: ignore[list-item]
        group([silent, A, B], [-9.0, 1.0, 0.0]),  # type: ignore[list-item]
        group([A], [1.0]),
    )
    assert kept == [((1.0, 0.0), [2, 4])]
    assert dropped["pairs/empty"] == 2.0


def test_the_counts_are_those_since_the_last_step() -> None:
    algorithm = DPO(DpoSection(loss=SimpoLoss()))
    ties, good = group([A, B], [1.0, 1.0]), group([A, B], [1.0, 0.0])
    assert algorithm.keep(ties)
    assert algorithm.select([ties]) == []
    examples = algorithm.select([ties, good])
    figures = [algorithm.credit(examples, [{}])[1].sums["pairs/tied"] for _ in range(2)]
    assert figures == [2.0, 0.0]


def test_the_reference_travels_with_each_side() -> None:
    algorithm = DPO(DpoSection())
    examples = algorithm.select([group([A, B], [0.0, 1.0])])
    said = tuple(np.full(5, value, dtype=np.float32) for value in (-1.0, -2.0))
    ((made,), metrics) = algorithm.credit(examples, [{Signal.REF_LOG_PROBS: said}])
    assert made.targets == (1.0, 0.0)
    assert [s.signals[Signal.REF_LOG_PROBS] is said[i] for i, s in enumerate(made.sequences)] == [True, True]
    assert metrics.warnings == ()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_reference_that_is_not_finite_is_named(value: float) -> None:
    algorithm = DPO(DpoSection())
    examples = algorithm.select([group([A, B], [0.0, 1.0])])
    said = np.full(5, -1.0, dtype=np.float32)
    outside, inside = said.copy(), said.copy()
    outside[0], inside[4] = value, value
    algorithm.credit(examples, [{Signal.REF_LOG_PROBS: (outside, said)}])
    with pytest.raises(NumericsError, match=r"b: ref_log_probs: 1 of 2"):
        algorithm.credit(examples, [{Signal.REF_LOG_PROBS: (said, inside)}])


def random_step(seed: int = 0) -> tuple[list[object], list[list[torch.Tensor]]]:
    """Pairs with answers of 1, an odd number of and many tokens; the policy's log-probs are leaves."""
    rng = np.random.default_rng(seed)
    experiences, said = [], []
    for n, sizes in enumerate([(1, 1), (1, 7), (5, 3), (12, 2), (4, 4)]):
        experiences.append(experience(pair(f"p{n}", *sizes), [rng.normal(-2, 0.5, size).tolist() for size in sizes]))
        said.append([numbers(*rng.normal(-2, 0.5, size)) for size in sizes])
    return experiences, said  # type: ignore[return-value]


@pytest.mark.parametrize("section", ALL, ids=lambda section: section.type)
@pytest.mark.parametrize("humanline", [False, True])
@pytest.mark.parametrize(
    "limits",
    [
        MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=1),
        MicroBatchLimits(num_ranks=3, max_tokens_per_micro_batch=40),
    ],
)
def test_loss_and_gradient_do_not_depend_on_the_split(
    section: PairLossSection, humanline: bool, limits: MicroBatchLimits
) -> None:
    """And masked positions, which hold NaN here, reach neither."""
    section = section.model_copy(update={"humanline": humanline})
    runs = []
    for chosen_limits in (None, limits):
        experiences, said = random_step()
        loss, metrics = learn(section, experiences, said, limits=chosen_limits)  # type: ignore[arg-type]
        loss.backward()
        runs.append((loss, [side.grad for sides in said for side in sides], metrics))
    (whole, gradients, figures), (split, split_gradients, split_figures) = runs
    assert whole.isfinite()
    torch.testing.assert_close(split, whole)
    torch.testing.assert_close(split_gradients, gradients)
    assert split_figures.sums == pytest.approx(figures.sums, rel=1e-5)


@pytest.mark.parametrize("section", ALL, ids=lambda section: section.type)
def test_gradients_through_the_packing_by_finite_differences(section: PairLossSection) -> None:
    experiences, said = random_step(1)
    leaves = [side for sides in said for side in sides]

    def loss(*values: torch.Tensor) -> torch.Tensor:
        pairs = [list(values[2 * i : 2 * i + 2]) for i in range(len(said))]
        return learn(section, experiences, pairs)[0]  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(loss, leaves, rtol=1e-3, atol=1e-6)


def test_sums_over_tokens_and_figures_of_each_side_by_hand() -> None:
    """Chosen -1-2 against the reference's -2-2.5, rejected -3 against -1: h = 1.5 + 2 = 3.5."""
    made = experience(pair("p", 2, 1), [[-2.0, -2.5], [-1.0]])
    loss, metrics = learn(DpoLoss(beta=0.2), [made], [[numbers(-1.0, -2.0), numbers(-3.0)]])
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.7)))
    assert metrics.sums == pytest.approx(
        {
            "policy/loss": loss.item(),
            "policy/entropy": 2.0,
            "pairs/accuracy": 1.0,
            "pairs/margin": 0.7,
            "pairs/chosen_reward": 0.3,
            "pairs/rejected_reward": -0.4,
            "pairs/chosen_log_prob": -3.0,
            "pairs/rejected_log_prob": -3.0,
        }
    )


def test_averages_over_tokens_where_the_loss_wants_them() -> None:
    made = experience(pair("p", 2, 4), [[-2.0, -2.0], [-1.0] * 4])
    said = [numbers(-1.0, -2.0), numbers(-1.0, -2.0, -3.0, -2.0)]
    loss, metrics = learn(IpoLoss(beta=0.5), [made], [said])
    assert loss.item() == pytest.approx((0.5 + 1.0 - 1.0) ** 2)
    assert metrics.sums["pairs/chosen_log_prob"] == pytest.approx(-1.5)
    assert learn(RpoLoss(beta=1.0, nll_coef=1.0), [made], [said])[0].item() == pytest.approx(
        math.log1p(math.exp(-(1.0 + 4.0))) + 1.5
    )


def test_beta_is_applied_once() -> None:
    made = experience(pair("p", 1, 1), [[-1.0], [-1.0]])
    for beta in (0.1, 1.0, 10.0):
        loss, metrics = learn(DpoLoss(beta=beta), [made], [[numbers(-0.9), numbers(-1.1)]])
        assert loss.item() == pytest.approx(math.log1p(math.exp(-beta * 0.2)))
        assert metrics.sums["pairs/margin"] == pytest.approx(beta * 0.2)


def test_the_policy_that_is_the_reference_has_ln_2_and_half_the_pairs() -> None:
    made = experience(pair("p", 3, 2), [[-1.0, -2.0, -3.0], [-0.5, -0.25]])
    loss, metrics = learn(DpoLoss(), [made], [[numbers(-1.0, -2.0, -3.0), numbers(-0.5, -0.25)]])
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics.sums["pairs/accuracy"] == 0.5


def test_humanline_clamps_tokens_before_they_are_summed() -> None:
    """Log-ratios +3, -0.5 and -4 become 1.5, -0.5 and -1: a clamped token has no gradient. Their sum alone would not
    have been clamped."""
    made = experience(pair("p", 3, 1), [[-4.0, -1.0, -1.0], [-1.0]])
    section = DpoLoss(beta=1.0, humanline=True)
    said = [numbers(-1.0, -1.5, -5.0), numbers(-1.0)]
    loss, metrics = learn(section, [made], [said])
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.0)))
    assert metrics.sums["pairs/clamped"] == pytest.approx(2 / 4)
    loss.backward()
    assert said[0].grad is not None
    assert [bool(g) for g in said[0].grad] == [False, True, False]


def test_humanline_on_a_loss_without_reference_clamps_towards_one() -> None:
    """lp = ref + clamp(lp - ref): -4 + 1.5 on chosen, -1 on rejected."""
    made = experience(pair("p", 1, 1), [[-4.0], [-1.0]])
    section = SimpoLoss(beta=1.0, gamma=0.0, humanline=True)
    loss, _ = learn(section, [made], [[numbers(-0.5), numbers(-1.0)]])
    assert loss.item() == pytest.approx(math.log1p(math.exp(-(-2.5 + 1.0))))


def test_a_missing_reference_is_named() -> None:
    with pytest.raises(ValueError, match="ref_log_probs"):
        learn(DpoLoss(), [experience(pair("p", 1, 1), None)], [[numbers(-1.0), numbers(-1.0)]])


def test_long_answers_keep_their_digits() -> None:
    """Answers of 4000 nats whose log-ratios differ by 0.01: sums of log-probs in float32 would round it away."""
    num_tokens = 2000
    ref = np.full(num_tokens, -2.0, dtype=np.float32)
    made = experience(pair("p", num_tokens, num_tokens), [ref.tolist(), ref.tolist()])
    said = [torch.tensor(ref), torch.tensor(ref)]
    said[0][5] += 0.01
    _, metrics = learn(DpoLoss(beta=1.0), [made], [said])
    assert metrics.sums["pairs/margin"] == pytest.approx(0.01, rel=1e-3)


def steps(algorithm: DPO, losses: Sequence[float]) -> list[str]:
    """What a run is told that has these losses."""
    told: list[str] = []
    for loss in losses:
        told += algorithm.credit([], [])[1].warnings
        assert algorithm.after_pass(Metrics(sums={"policy/loss": loss}))
    return told


def test_a_loss_that_stays_at_ln_2_is_told_once_with_the_checks_in_order() -> None:
    (text,) = steps(DPO(DpoSection()), [0.6931] * 200)
    checks = ["updates are applied", "contradict", "ties", "same responses", "beta"]
    assert [text.index(check) for check in checks] == sorted(text.index(check) for check in checks)
    assert "0.6931" in text
    assert str(PATIENCE_STEPS) in text


@pytest.mark.parametrize(
    ("loss", "losses"),
    [
        ("dpo", [0.6931] * 30 + [0.66] * 170),
        ("dpo", [0.6931] * (PATIENCE_STEPS - 1)),
        ("dpo", [0.6931 - 0.01] * 200),
        ("simpo", [0.6931] * 200),
        ("hinge", [0.6931] * 200),
    ],
)
def test_a_loss_that_moves_or_never_began_at_ln_2_is_not(loss: str, losses: list[float]) -> None:
    assert steps(DPO(DpoSection.model_validate({"loss": {"type": loss}})), losses) == []


def test_the_watch_continues_after_a_restart() -> None:
    whole = StuckLossWatch(watches=True)
    for _ in range(PATIENCE_STEPS - 3):
        whole.observe(0.693)
    again = DPO(DpoSection())
    again.restore(whole.state())
    assert len(steps(again, [0.693] * 10)) == 1
    assert steps(again, [0.693] * 100) == []
    with pytest.raises(CheckpointError):
        again.restore({})
