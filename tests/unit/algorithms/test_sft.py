"""Supervised fine-tuning: likelihood of what a demonstration's assistant wrote."""

import math

import pytest
import torch

from rlhf.algorithms.base import Outputs, TensorBatch
from rlhf.algorithms.sft import SFT
from rlhf.config.algo import SftSection
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, plan_batches
from rlhf.types import Head, Role
from tests.unit.algorithms.build import group, rollout

DEMONSTRATIONS = [
    group([rollout([1, 2, 3], name="a")], [0.0]),
    group([rollout([1, 2, 3, 4, 5], name="b", loss_mask=[True, False, False, True, True])], [0.0]),
]


def test_needs() -> None:
    needs = SFT(SftSection()).needs
    assert needs.trains == {Role.POLICY: Head.LOG_PROBS}
    assert not needs.signals
    assert not needs.online


def test_only_the_assistants_turns_are_learned_from() -> None:
    first, second = SFT(SftSection()).select(DEMONSTRATIONS)
    assert first.sequences[0].loss_mask.tolist() == [False] * 3 + [True] * 3
    assert second.sequences[0].loss_mask.tolist() == [False] * 3 + [True, False, False, True, True]


def test_a_demonstration_without_an_answer_is_not_kept() -> None:
    algorithm = SFT(SftSection())
    assert algorithm.keep(DEMONSTRATIONS[0])
    assert not algorithm.keep(group([rollout([])], [0.0]))
    assert not algorithm.keep(group([rollout([1], loss_mask=[False])], [0.0]))


@pytest.mark.parametrize("max_tokens", [1, 100])
def test_mean_likelihood_of_all_tokens_of_the_step(max_tokens: int) -> None:
    """Log-probs -1 in the one answer and -3 in the other; three tokens each: 2, in one micro-batch or two."""
    algorithm = SFT(SftSection())
    experiences, metrics = algorithm.credit(algorithm.select(DEMONSTRATIONS), [])
    assert metrics.sums["response/length"] == 3.0
    plan = plan_batches(experiences, MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=max_tokens))
    total, figure = 0.0, 0.0
    for batch in build_batches(plan, experiences, Role.POLICY):
        lengths = torch.tensor(batch.tokens.lengths)
        log_probs = torch.where(lengths == 6, -1.0, -3.0).repeat_interleave(lengths)
        log_probs[~torch.tensor(batch.loss_mask)] = math.nan
        log_probs.requires_grad_()
        x = Outputs(predictions=log_probs)
        got = algorithm.objectives()[Role.POLICY](x, TensorBatch.from_numpy(batch, torch.device("cpu")))
        got.loss.backward()
        assert log_probs.grad is not None
        assert log_probs.grad.tolist() == pytest.approx((-torch.tensor(batch.loss_mask).float() / 6).tolist())
        total, figure = total + got.loss.item(), figure + got.metrics.sums["policy/loss"]
    assert total == pytest.approx(2.0)
    assert figure == pytest.approx(2.0)


def test_it_remembers_nothing() -> None:
    algorithm = SFT(SftSection())
    algorithm.restore(algorithm.state())
    assert algorithm.state() == {}
