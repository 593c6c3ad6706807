"""Process reward model: labels where steps end, their loss, and how well a model is judged by held-out steps."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.algorithms.base import Outputs, TensorBatch
from rlhf.algorithms.prm import PRM, first_error, judge_steps, step_loss
from rlhf.config.algo import PrmSection
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, plan_batches
from rlhf.types import Example, Experience, Head, Metrics, Prompt, Role, ScoredGroup, Signal
from tests.unit.algorithms.build import group, rollout


def answer(labels: Sequence[float], ends: Sequence[int], length: int, name: str = "a") -> ScoredGroup:
    """An answer of `length` tokens to a prompt of three; step k ends at token `ends[k]` of the answer."""
    mask = [i in ends for i in range(length)]
    made = rollout([1] * length, name=name, loss_mask=mask)
    return group([replace(made, step_labels=tuple(labels))], [0.0], name=f"p-{name}")


GROUPS = [
    answer([1.0, 0.0], [1, 4], 5, "a"),
    answer([1.0], [0], 1, "b"),
    answer([0.0, 1.0, 0.25], [0, 1, 6], 8, "c"),
]


def learn(
    experiences: Sequence[Experience], scores: Sequence[torch.Tensor], limits: MicroBatchLimits | None = None
) -> tuple[torch.Tensor, Metrics]:
    """The step's loss and figures, summed over the micro-batches of a plan."""
    plan = plan_batches(experiences, limits or MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=1000))
    total, metrics = torch.zeros((), dtype=torch.float64), Metrics()
    for members, batch in zip(plan.micro_batches, build_batches(plan, experiences, Role.REWARD), strict=True):
        if batch.is_padding:
            continue
        tensors = TensorBatch.from_numpy(batch, torch.device("cpu"))
        outputs = Outputs(predictions=torch.cat([scores[i] for i in members]))
        got = PRM(PrmSection()).objectives()[Role.REWARD](outputs, tensors)
        total, metrics = total + got.loss, metrics + got.metrics
    return total, metrics


def scored(experiences: Sequence[Experience], seed: int = 0) -> list[torch.Tensor]:
    """Random scores at the ends of steps; NaN everywhere else."""
    rng = np.random.default_rng(seed)
    return [
        torch.tensor(np.where(s.loss_mask, rng.normal(size=len(s.token_ids)), np.nan), requires_grad=True)
        for e in experiences
        for s in e.sequences
    ]


def test_needs() -> None:
    needs = PRM(PrmSection()).needs
    assert needs.trains == {Role.REWARD: Head.TOKEN_SCORES}
    assert not needs.signals
    assert not needs.online


def labels_of(example: Example) -> list[float]:
    """Labels of the steps that are learned from, in order."""
    labels: list[float] = example.token_targets[0][example.sequences[0].loss_mask].tolist()
    return labels


def test_labels_stand_where_steps_end() -> None:
    algorithm = PRM(PrmSection())
    examples = algorithm.select(GROUPS)
    assert [labels_of(e) for e in examples] == [[1.0, 0.0], [1.0], [0.0, 1.0, 0.25]]
    experiences, metrics = algorithm.credit(examples, [])
    (first,) = experiences[0].sequences
    assert first.loss_mask.tolist() == [False] * 4 + [True, False, False, True]
    assert first.signals[Signal.TOKEN_TARGETS].tolist() == [0.0] * 4 + [1.0, 0.0, 0.0, 0.0]
    assert metrics.sums == pytest.approx({"steps/good": 3.25 / 6, "steps/per_response": 2.0})


def test_an_answer_without_labeled_steps_is_not_kept() -> None:
    algorithm = PRM(PrmSection())
    unlabeled = group([rollout([1, 2])], [0.0])
    none = answer([], [], 3)
    assert [algorithm.keep(g) for g in (GROUPS[0], unlabeled, none)] == [True, False, False]
    assert algorithm.select([unlabeled, none]) == []
    assert algorithm.credit([], [])[1].sums == {"steps/good": 0.0, "steps/per_response": 0.0}


def test_labels_stay_with_their_steps_where_the_first_token_is_not_learned_from() -> None:
    """Without a prompt, a step that ends at the very first token is left out, with its own label."""
    bare = answer([0.0, 1.0], [0, 2], 3)
    bare = replace(bare, prompt=Prompt(id="p", token_ids=np.zeros(0, dtype=np.int64), text=""))
    (example,) = PRM(PrmSection()).select([bare])
    assert labels_of(example) == [1.0]
    assert example.sequences[0].loss_mask.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("score", "label", "expected"),
    [
        (0.0, 1.0, math.log(2)),
        (0.0, 0.0, math.log(2)),
        (2.0, 1.0, math.log1p(math.exp(-2.0))),
        (2.0, 0.0, 2.0 + math.log1p(math.exp(-2.0))),
        (2.0, 0.25, 1.5 + math.log1p(math.exp(-2.0))),
        (-1e4, 1.0, 1e4),
    ],
)
def test_golden_losses(score: float, label: float, expected: float) -> None:
    assert step_loss(torch.tensor(score), torch.tensor(label)).item() == pytest.approx(expected, rel=1e-6)


def test_every_step_weighs_the_same() -> None:
    """Six steps in three answers, by hand."""
    experiences, _ = PRM(PrmSection()).credit(PRM(PrmSection()).select(GROUPS), [])
    scores = scored(experiences)
    said = np.concatenate([s.detach().numpy() for s in scores])
    said = said[~np.isnan(said)]
    labels = np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.25])
    loss, metrics = learn(experiences, scores)
    assert loss.item() == pytest.approx(np.mean(np.log1p(np.exp(said)) - labels * said))
    assert metrics.sums["reward/loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics.sums["reward/accuracy"] == pytest.approx(np.mean((said > 0) == (labels > 0.5)))
    judged = judge_steps([said[:2], said[2:3], said[3:]], [labels[:2], labels[2:3], labels[3:]])
    assert judged["loss"] == pytest.approx(loss.item())
    assert judged["accuracy"] == pytest.approx(metrics.sums["reward/accuracy"])


@pytest.mark.parametrize(
    "limits",
    [
        MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=1),
        MicroBatchLimits(num_ranks=4, max_tokens_per_micro_batch=12),
    ],
)
def test_neither_loss_nor_gradient_depends_on_the_split(limits: MicroBatchLimits) -> None:
    experiences, _ = PRM(PrmSection()).credit(PRM(PrmSection()).select(GROUPS), [])
    whole, split = scored(experiences), scored(experiences)
    one, figures = learn(experiences, whole)
    other, split_figures = learn(experiences, split, limits)
    one.backward()
    other.backward()
    assert other.item() == pytest.approx(one.item())
    assert split_figures.sums == pytest.approx(figures.sums)
    for a, b in zip(whole, split, strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad, b.grad)
        assert not a.grad.isnan().any()
        assert (a.grad[a.isnan()] == 0.0).all()


def test_the_gradient_by_finite_differences() -> None:
    experiences, _ = PRM(PrmSection()).credit(PRM(PrmSection()).select(GROUPS), [])
    scores = [torch.nan_to_num(s.detach()).requires_grad_() for s in scored(experiences)]
    assert torch.autograd.gradcheck(lambda *s: learn(experiences, s)[0], scores, eps=1e-6, atol=1e-7)


def test_first_errors() -> None:
    assert first_error(np.array([True, False, False])) == 1
    assert first_error(np.array([True])) == -1
    scores = [np.array([1.0, -1.0, 1.0]), np.array([2.0, 3.0]), np.array([1.0, 1.0])]
    labels = [np.array([1.0, 0.0, 0.0]), np.array([1.0, 1.0]), np.array([0.0, 1.0])]
    judged = judge_steps(scores, labels)
    assert judged["first_error"] == pytest.approx(2 / 3)
    assert judged["accuracy"] == pytest.approx(5 / 7)
    assert judged["num_steps"] == 7.0
    assert judge_steps([np.zeros(1)], [np.ones(1)])["accuracy"] == 0.5


def test_it_remembers_nothing() -> None:
    algorithm = PRM(PrmSection())
    algorithm.restore(algorithm.state())
    assert algorithm.state() == {}
    assert algorithm.after_pass(Metrics())
