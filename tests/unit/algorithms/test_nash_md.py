"""Nash-MD: the preference, the advantage and its gradient."""

import math

import numpy as np
import pytest
import torch

from rlhf.algorithms.base import Outputs, TensorBatch
from rlhf.algorithms.nash_md import NashMD
from rlhf.config.algo import NashMdSection
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, plan_batches
from rlhf.types import Example, FinishReason, Head, Role, Signal, Signals
from tests.unit.algorithms.build import group, rollout, signals

OWN, OPPONENT = rollout([1, 2, 3], name="own"), rollout([4], name="opponent")


def duel(rewards: tuple[float, float], algorithm: NashMD) -> Example:
    (example,) = algorithm.select([group([OWN, OPPONENT], rewards)])
    return example


def measured(example: Example, old: list[float], ref: list[float]) -> Signals:
    made = signals(example, old=old, ref=ref, values=[0.0] * len(old))
    return {signal: made[signal] for signal in (Signal.OLD_LOG_PROBS, Signal.REF_LOG_PROBS)}


def test_needs() -> None:
    needs = NashMD(NashMdSection()).needs
    assert needs.trains == {Role.POLICY: Head.LOG_PROBS}
    assert needs.signals == {"old_log_probs", "ref_log_probs"}
    assert (needs.mixture, needs.opponents, needs.ema_reference) == (0.25, 1, None)


@pytest.mark.parametrize(
    ("kind", "rewards", "probability"),
    [
        ("bradley-terry", (2.0, 0.5), 0.8176),
        ("bradley-terry", (1.0, 1.0), 0.5),
        ("bradley-terry", (-1000.0, 1000.0), 0.0),
        ("win-rate", (0.75, 0.25), 0.75),
        ("win-rate", (0.0, 1.0), 0.0),
        ("win-rate", (0.5, 0.5), 0.5),
    ],
)
def test_the_preference(kind: str, rewards: tuple[float, float], probability: float) -> None:
    algorithm = NashMD(NashMdSection.model_validate({"preference": kind}))
    example = duel(rewards, algorithm)
    _, metrics = algorithm.credit([example], [measured(example, [-1.0] * 3, [-1.0] * 3)])
    assert metrics.sums["nash/preference"] == pytest.approx(probability, abs=5e-5)


def test_the_opponent_is_not_learned_from_and_the_silent_are_dropped() -> None:
    algorithm = NashMD(NashMdSection())
    aborted = rollout([1], name="aborted", finish_reason=FinishReason.ABORTED)
    groups = [group(pair, [1.0, 0.0]) for pair in ([OWN, OPPONENT], [aborted, OPPONENT], [OWN, aborted])]
    examples = algorithm.select(groups)
    assert [e.id for e in examples] == ["own"]
    assert [len(e.sequences) for e in examples] == [1]
    signal = measured(examples[0], [-1.0] * 3, [-1.0] * 3)
    assert algorithm.credit(examples, [signal])[1].sums["pairs/empty"] == 2.0
    assert algorithm.credit(examples, [signal])[1].sums["pairs/empty"] == 0.0


def test_advantages_by_hand() -> None:
    """P = 1 - 0: 1/2, less beta times the log-ratios 0.5, -1, 0.25 that are still to come."""
    algorithm = NashMD(NashMdSection(beta=0.4, preference="win-rate"))
    example = duel((1.0, 0.0), algorithm)
    ((made,), _) = algorithm.credit([example], [measured(example, [-1.0, -2.0, -1.0], [-1.5, -1.0, -1.25])])
    to_come = np.array([-0.25, -0.75, 0.25])
    advantages = made.sequences[0].signals[Signal.ADVANTAGES]
    assert advantages is not None
    assert advantages[3:].tolist() == pytest.approx((0.5 - 0.4 * to_come).tolist())
    assert advantages[:3].tolist() == [0.0, 0.0, 0.0]


def test_the_gradient_is_that_of_the_expected_preference_and_kl() -> None:
    """By enumeration: over all answers of two tokens that a small policy can give, the mean gradient of the loss is
    the derivative of -(sum_y pi(y) P(y) - beta * KL(pi, ref))."""
    beta, rng = 0.3, np.random.default_rng(4)
    logits = torch.tensor(rng.normal(size=(1 + 3, 3)), requires_grad=True)  # the first token's, then the second's
    ref = torch.log_softmax(torch.tensor(rng.normal(size=(1 + 3, 3))), -1)
    rewards = rng.normal(size=(3, 3))
    own = torch.log_softmax(logits, -1)
    answers = [(i, j) for i in range(3) for j in range(3)]
    lp = torch.stack([own[0, i] + own[1 + i, j] for i, j in answers])
    ref_lp = torch.stack([ref[0, i] + ref[1 + i, j] for i, j in answers])
    preference = torch.sigmoid(torch.tensor(rewards.reshape(-1)))
    wanted = -(lp.exp() * (preference - beta * (lp - ref_lp))).sum()
    (exact,) = torch.autograd.grad(wanted, logits, retain_graph=True)

    algorithm = NashMD(NashMdSection(beta=beta))
    mean = torch.zeros((), dtype=torch.float64)
    for (i, j), log_prob in zip(answers, lp.detach(), strict=True):
        (example,) = algorithm.select([group([rollout([i, j]), OPPONENT], [rewards[i, j], 0.0])])
        tokens = torch.stack([own[0, i], own[1 + i, j]])
        signal = measured(example, tokens.tolist(), [ref[0, i].item(), ref[1 + i, j].item()])
        experiences, _ = algorithm.credit([example], [signal])
        plan = plan_batches(experiences, MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=10))
        (batch,) = build_batches(plan, experiences, Role.POLICY)
        predictions = torch.cat([torch.full((3,), math.nan, dtype=torch.float64), tokens])
        outputs = Outputs(predictions=predictions, entropy=torch.ones_like(predictions).detach())
        tensors = TensorBatch.from_numpy(batch, torch.device("cpu"))
        mean = mean + log_prob.exp() * algorithm.objectives()[Role.POLICY](outputs, tensors).loss
    (got,) = torch.autograd.grad(mean, logits)
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-6)


def test_each_prompt_weighs_the_same_however_the_step_is_split() -> None:
    algorithm = NashMD(NashMdSection())
    examples = [duel((1.0, 0.0), algorithm), duel((0.0, 1.0), algorithm)]
    experiences, _ = algorithm.credit(examples, [measured(e, [-1.0] * 3, [-2.0] * 3) for e in examples])
    losses = []
    for limits in (
        MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=100),
        MicroBatchLimits(num_ranks=2, max_tokens_per_micro_batch=1),
    ):
        plan = plan_batches(experiences, limits)
        loss = torch.zeros(())
        for batch in build_batches(plan, experiences, Role.POLICY):
            said = torch.full((len(batch.loss_mask),), -1.0)
            tensors = TensorBatch.from_numpy(batch, torch.device("cpu"))
            loss = loss + algorithm.objectives()[Role.POLICY](Outputs(predictions=said, entropy=-said), tensors).loss
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1])
