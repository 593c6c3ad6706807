"""The reward model's ranking, loss and accuracy."""

import itertools
import math

import numpy as np
import pytest
import torch

from rlhf.algorithms.base import LossOutput, Outputs, TensorBatch
from rlhf.algorithms.rm import RM, count_ordered_pairs, pair_accuracy, rank
from rlhf.config.algo import RmSection
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, plan_batches
from rlhf.types import Example, Experience, Head, Metrics, Role, ScoredGroup
from tests.unit.algorithms.build import group, rollout

ANSWERS = [rollout([i, i], name=f"a{i}") for i in range(9)]


def ranking(rewards: list[float], margins: list[float] | None = None, name: str = "p") -> ScoredGroup:
    return group(ANSWERS[: len(rewards)], rewards, margins=margins or (), name=name)


def learn(
    groups: list[ScoredGroup],
    scores: list[list[float]],
    *,
    limits: MicroBatchLimits | None = None,
    use_margins: bool = True,
) -> tuple[LossOutput, torch.Tensor, Metrics]:
    """The step's loss, its gradient by each score, and its figures; `scores` in the order of each example."""
    algorithm = RM(RmSection(use_margins=use_margins))
    examples = algorithm.select(groups)
    experiences, _ = algorithm.credit(examples, [])
    starts = np.cumsum([0, *(len(e.sequences) for e in experiences)])
    flat = torch.tensor([s for row in scores for s in row], dtype=torch.float64, requires_grad=True)
    total, metrics = torch.zeros((), dtype=torch.float64), Metrics()
    plan = plan_batches(experiences, limits or MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=10_000))
    for members, batch in zip(plan.micro_batches, build_batches(plan, experiences, Role.REWARD), strict=True):
        if batch.is_padding:
            continue
        rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in members])
        tensors = TensorBatch.from_numpy(batch, torch.device("cpu"))
        got = algorithm.objectives()[Role.REWARD](Outputs(predictions=flat[rows]), tensors)
        total, metrics = total + got.loss, metrics + got.metrics
    total.backward()
    assert flat.grad is not None
    return LossOutput(loss=total), flat.grad, metrics


def test_needs() -> None:
    needs = RM(RmSection()).needs
    assert needs.trains == {Role.REWARD: Head.SCORES}
    assert needs.signals == frozenset()
    assert not needs.online


def test_golden_pair() -> None:
    output, _, metrics = learn([ranking([1.0, 0.0])], [[2.0, 0.5]])
    assert output.loss.item() == pytest.approx(0.2014, abs=5e-5)
    expected = {"reward/accuracy": 1.0, "reward/margin": 1.5, "reward/chosen": 2.0, "reward/rejected": 0.5}
    assert {name: metrics.sums[name] for name in expected} == pytest.approx(expected)
    output, _, metrics = learn([ranking([1.0, 0.0])], [[0.5, 2.0]])
    assert output.loss.item() == pytest.approx(1.7014, abs=5e-5)
    assert metrics.sums["reward/accuracy"] == 0.0


def test_untrained_is_ln_2_and_half_right() -> None:
    output, _, metrics = learn([ranking([3.0, 2.0, 1.0])], [[0.0, 0.0, 0.0]])
    assert output.loss.item() == pytest.approx(math.log(2))
    assert metrics.sums["reward/accuracy"] == 0.5


def test_all_pairs_of_a_prompt_then_all_prompts() -> None:
    """Three pairs of one prompt weigh as much together as the one pair of the other."""
    scores = [[0.3, -0.2, 1.0], [0.4, 0.1]]
    output, _, _ = learn([ranking([3.0, 2.0, 1.0], name="x"), ranking([1.0, 0.0], name="y")], scores)

    def nll(gap: float) -> float:
        return math.log1p(math.exp(-gap))

    first = np.mean([nll(scores[0][i] - scores[0][j]) for i, j in itertools.combinations(range(3), 2)])
    assert output.loss.item() == pytest.approx((first + nll(0.3)) / 2)


@pytest.mark.parametrize(
    "limits",
    [
        MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=1),
        MicroBatchLimits(num_ranks=3, max_tokens_per_micro_batch=30),
    ],
)
def test_the_gradient_does_not_depend_on_the_split(limits: MicroBatchLimits) -> None:
    rng = np.random.default_rng(0)
    sizes = [2, 4, 3, 9, 2]
    groups = [ranking(list(range(k)), name=f"p{n}") for n, k in enumerate(sizes)]
    scores = [rng.normal(size=k).tolist() for k in sizes]
    _, whole, figures = learn(groups, scores)
    _, split, split_figures = learn(groups, scores, limits=limits)
    torch.testing.assert_close(split, whole)
    assert split_figures.sums == pytest.approx(figures.sums)


def test_margins() -> None:
    """Margins stand against the first answer; between the second and the third lies their difference."""
    groups = [ranking([3.0, 2.0, 1.0], [0.5, 2.0])]
    scores = [[3.0, 2.0, 0.0]]
    output, _, _ = learn(groups, scores)
    gaps = (1.0 - 0.5, 3.0 - 2.0, 2.0 - 1.5)
    assert output.loss.item() == pytest.approx(np.mean([math.log1p(math.exp(-gap)) for gap in gaps]))
    without, _, _ = learn(groups, scores, use_margins=False)
    assert without.loss.item() == pytest.approx(np.mean([math.log1p(math.exp(-gap)) for gap in (1.0, 3.0, 2.0)]))


def test_best_first_and_margins_turned_with_it() -> None:
    """First given: reward 2, margins +1 over the worst and -0.5 over the best."""
    example = rank(ranking([2.0, 1.0, 3.0], [1.0, -0.5]))
    assert example.rewards == (3.0, 2.0, 1.0)
    assert [s.token_ids[-1] for s in example.sequences] == [2, 0, 1]
    assert example.margins == (0.5, 1.5)


def test_ties_are_no_pairs() -> None:
    """One of three pairs is tied: it has no gradient and does not count in the mean."""
    output, gradient, _ = learn([ranking([1.0, 0.0, 0.0])], [[1.0, 0.0, 0.0]])
    assert output.loss.item() == pytest.approx(math.log1p(math.exp(-1.0)))
    assert gradient[1] == gradient[2]


def test_what_teaches_nothing_is_dropped_and_counted() -> None:
    same = [rollout([7, 7], name="a"), rollout([7, 7], name="b"), rollout([8], name="c")]
    algorithm = RM(RmSection())
    groups = [
        ranking([1.0, 1.0], name="tied"),
        group(same[:2], [1.0, 0.0], name="identical"),
        group(same, [2.0, 1.0, 0.0], name="partly identical"),
        ranking([1.0, 0.0], name="good"),
        ranking([1.0], name="alone"),
        ranking([2.0, 1.0, 1.0], name="partly tied"),
    ]
    assert [algorithm.keep(g) for g in groups] == [False, False, True, True, False, True]
    examples = algorithm.select(groups)
    assert [(e.id, e.rewards) for e in examples] == [
        ("partly identical", (2.0, 0.0)),
        ("good", (1.0, 0.0)),
        ("partly tied", (2.0, 1.0, 1.0)),
    ]
    _, metrics = algorithm.credit(examples, [])
    assert metrics.sums["pairs/dropped"] == 1 + 1 + 2 + 0 + 0 + 1
    assert algorithm.credit([], [])[1].sums["pairs/dropped"] == 0.0


def test_nothing_but_the_scores_of_pairs_matters() -> None:
    """A micro-batch whose every example is another rank's still has a (zero) gradient to give."""
    algorithm = RM(RmSection())
    sequence = algorithm.credit(algorithm.select([ranking([1.0, 0.0])]), [])[0][0].sequences[0]
    lonely = Experience(id="x", sequences=(sequence,), targets=(1.0,))
    plan = plan_batches([lonely], MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=10))
    (batch,) = build_batches(plan, [lonely], Role.REWARD)
    scores = torch.tensor([math.nan], requires_grad=True)
    tensors = TensorBatch.from_numpy(batch, torch.device("cpu"))
    got = algorithm.objectives()[Role.REWARD](Outputs(predictions=scores), tensors)
    got.loss.backward()
    assert got.loss.item() == 0.0
    assert scores.grad is not None
    assert scores.grad.tolist() == [0.0]


def test_gradient_by_hand() -> None:
    """-sigmoid(-gap) on the better, + on the worse."""
    _, gradient, _ = learn([ranking([1.0, 0.0])], [[2.0, 0.5]])
    p = 1 / (1 + math.exp(1.5))
    assert gradient.tolist() == pytest.approx([-p, p])


def test_pair_accuracy_counts_every_pair_once() -> None:
    """Six pairs of four answers, five right, and one wrong pair: 5 of 7, not the mean of 5/6 and 0."""
    examples = [rank(ranking([4.0, 3.0, 2.0, 1.0])), rank(ranking([1.0, 0.0]))]
    assert pair_accuracy(examples, [[4.0, 2.0, 3.0, 1.0], [0.0, 1.0]]) == (pytest.approx(5 / 7), 7)
    assert pair_accuracy(examples[1:], [[0.5, 0.5]]) == (0.5, 1)
    assert pair_accuracy([], []) == (0.0, 0)


@pytest.mark.parametrize(("rewards", "pairs"), [((), 0), ((1.0,), 0), ((1.0, 1.0), 0), ((2.0, 1.0, 1.0), 2)])
def test_count_ordered_pairs(rewards: tuple[float, ...], pairs: int) -> None:
    assert count_ordered_pairs(rewards) == pairs


def test_sequences_hold_prompt_and_answer() -> None:
    (example,) = RM(RmSection()).select([ranking([1.0, 0.0])])
    assert isinstance(example, Example)
    assert [s.token_ids.tolist() for s in example.sequences] == [[100, 101, 102, 0, 0], [100, 101, 102, 1, 1]]
