"""Evaluation: every row once, every token and pair with the same weight."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from rlhf.algorithms.kto import KTO
from rlhf.algorithms.prm import PRM
from rlhf.algorithms.rm import RM
from rlhf.algorithms.sft import SFT
from rlhf.config.algo import KtoSection, PrmSection, RmSection, SftSection
from rlhf.config.run import TrainSection
from rlhf.engines.fakes import FakeReward, FakeRollout, FakeScorer, FakeTrainEngine, log_softmax
from rlhf.errors import RlhfError
from rlhf.orchestrator.evaluation import (
    LabelEvaluator,
    LikelihoodEvaluator,
    LossEvaluator,
    PairEvaluator,
    SampleEvaluator,
    StepEvaluator,
    describe_pairs,
    score_gaps,
)
from rlhf.orchestrator.step.sampler import Sampler
from rlhf.orchestrator.step.token_scores import Models
from rlhf.types import Head, Prompt, Reward, Role, Rollout, RolloutRequest, Sampling, ScoredGroup
from tests.unit.orchestrator.support import TOKENIZER, given_group, labeled_group, make_prompt

TABLE = np.linspace(-1.0, 1.0, TOKENIZER.num_tokens)


def model(role: Role, head: Head, num_ranks: int) -> Models:
    return Models(trained={role: FakeTrainEngine(TABLE, head, num_ranks=num_ranks)})


@pytest.mark.parametrize(("num_ranks", "max_tokens"), [(1, 1000), (3, 6), (2, 1)])
def test_likelihood_weighs_every_token_the_same(num_ranks: int, max_tokens: int) -> None:
    groups = [given_group(0, ["h" * 10], [0.0]), given_group(1, ["a"], [0.0]), given_group(2, ["a"], [0.0])]
    evaluator = LikelihoodEvaluator(
        model(Role.POLICY, Head.LOG_PROBS, num_ranks),
        SFT(SftSection()),
        groups,
        TrainSection(batch_size=1, max_tokens_per_micro_batch=max_tokens),
    )
    said = log_softmax(TABLE)
    expected = -(10 * said[9] + 2 * said[2] + 3 * said[1]) / 15
    metrics = evaluator.evaluate(3).metrics
    assert metrics["eval/loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["eval/perplexity"] == pytest.approx(np.exp(expected), rel=1e-6)


@pytest.mark.parametrize(("num_ranks", "max_tokens"), [(1, 1000), (3, 6)])
def test_a_method_without_an_evaluator_of_its_own_is_measured_by_its_loss(num_ranks: int, max_tokens: int) -> None:
    """Of SFT, this is what its own evaluator measures."""
    groups = [given_group(0, ["h" * 5], [0.0]), given_group(1, ["a"], [0.0])]
    models = model(Role.POLICY, Head.LOG_PROBS, num_ranks)
    train = TrainSection(batch_size=1, max_tokens_per_micro_batch=max_tokens)
    metrics = LossEvaluator(models, SFT(SftSection()), groups, train).evaluate(3).metrics
    likelihood = LikelihoodEvaluator(models, SFT(SftSection()), groups, train).evaluate(3).metrics
    assert metrics["eval/loss"] == pytest.approx(likelihood["eval/loss"], rel=1e-6)
    assert LossEvaluator(models, SFT(SftSection()), [], train).evaluate(3).metrics == {}


def test_evaluations_ask_with_the_same_seeds_and_under_other_names() -> None:
    """A response of an evaluation that failed is not taken for one of the next."""
    asked: list[RolloutRequest] = []

    class Engine(FakeRollout):
        def submit(self, requests: Sequence[RolloutRequest]) -> list[Future[Rollout]]:
            asked.extend(requests)
            return super().submit(requests)

    engine, prompts = Engine(TOKENIZER.num_tokens), [make_prompt(0), make_prompt(0)]
    evaluator = SampleEvaluator(Sampler(engine, FakeReward(), TOKENIZER), prompts, Sampling(max_tokens=3), 0)
    for version in (1, 2):
        engine.receive(version, TABLE)
        evaluator.evaluate(version)
    assert len({request.id for request in asked}) == 4
    assert [request.seed for request in asked[:2]] == [request.seed for request in asked[2:]]


def test_pair_accuracy_is_over_pairs_and_not_over_batches() -> None:
    """A ranking of three (all pairs right) and one pair (wrong): 3/4, where a mean over rows would say 1/2."""
    assert score_gaps([3.0, 2.0, 1.0], [2.0, 1.0, 0.0]).tolist() == [1.0, 2.0, 1.0]
    gaps = np.concatenate([score_gaps([3.0, 2.0, 1.0], [2.0, 1.0, 0.0]), score_gaps([0.0, 1.0], [1.0, 0.0])])
    metrics = describe_pairs(gaps)
    assert metrics["eval/accuracy"] == 0.75
    assert metrics["eval/num_pairs"] == 4
    assert describe_pairs(np.zeros(1, dtype=np.float32))["eval/accuracy"] == 0.5
    assert describe_pairs(np.array([1.5], dtype=np.float32))["eval/loss"] == pytest.approx(0.2014, abs=1e-4)


def test_pairs_with_equal_rewards_are_no_pairs() -> None:
    assert score_gaps([1.0, 2.0, 3.0], [1.0, 1.0, 0.0]).tolist() == [-2.0, -1.0]


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_reward_model_is_measured_on_every_pair(num_ranks: int) -> None:
    groups = [given_group(i, ["ab", "ba", "bb"], [2.0, 1.0, 0.0]) for i in range(4)]
    groups += [given_group(9, ["a", "b"], [0.0, 1.0])]
    evaluator = PairEvaluator(
        model(Role.REWARD, Head.SCORES, num_ranks),
        RM(RmSection()),
        groups,
        TrainSection(batch_size=1, max_tokens_per_micro_batch=12),
    )
    metrics = evaluator.evaluate(1).metrics
    assert metrics["eval/num_pairs"] == 13
    assert metrics["eval/accuracy"] == 0.5  # every response ends with the same token: all scores are equal


class TwoThirds(FakeReward):
    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        return [Reward(total=float(i < 2), parts={"rule": float(i < 2)}) for i in range(len(rollouts))]


def test_sampled_responses_are_averaged_over_every_prompt() -> None:
    engine = FakeRollout(TOKENIZER.num_tokens)
    engine.receive(4, TABLE)
    prompts = [make_prompt(i) for i in (1, 2, 2)]
    evaluator = SampleEvaluator(
        Sampler(engine, TwoThirds(), TOKENIZER), prompts, Sampling(max_tokens=3, temperature=0), 0
    )
    evaluation = evaluator.evaluate(4)
    metrics = evaluation.metrics
    assert metrics["eval/reward"] == pytest.approx(2 / 3)
    assert metrics["eval/source/rule"] == pytest.approx(2 / 3)
    assert metrics["eval/length"] == 3
    assert metrics["eval/truncated"] == 1
    assert [group.prompt for group in evaluation.responses] == prompts
    assert [group.rewards[0].total for group in evaluation.responses] == [1.0, 1.0, 0.0]
    assert all(len(group.responses) == len(group.texts) == 1 for group in evaluation.responses)
    assert evaluator.evaluate(4).metrics == metrics
    with pytest.raises(RlhfError, match="3 of 3 responses were sampled from weights of version 4"):
        evaluator.evaluate(5)


@pytest.mark.parametrize(("num_ranks", "max_tokens"), [(1, 1000), (3, 9)])
def test_label_metrics_by_hand(num_ranks: int, max_tokens: int) -> None:
    """The policy likes late letters, the reference none: good responses of late letters have the higher log-ratio."""
    labels = {"h": True, "g": False, "b": True}
    groups = [labeled_group(i, [answer], [label]) for i, (answer, label) in enumerate(labels.items())]
    flat = FakeScorer(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, num_ranks)
    models = replace(model(Role.POLICY, Head.LOG_PROBS, num_ranks), reference=flat)
    evaluator = LabelEvaluator(
        models, KTO(KtoSection(beta=0.5)), groups, TrainSection(batch_size=1, max_tokens_per_micro_batch=max_tokens)
    )
    ratios = log_softmax(TABLE) - log_softmax(np.zeros(TOKENIZER.num_tokens))
    of_answer = {letter: float(ratios[TOKENIZER.encode(letter)[0]] + ratios[1]) for letter in "hgb"}
    metrics = evaluator.evaluate(1).metrics
    assert metrics["eval/auc"] == 0.5
    assert metrics["eval/desirable_reward"] == pytest.approx((of_answer["h"] + of_answer["b"]) / 4, rel=1e-5)
    assert metrics["eval/undesirable_reward"] == pytest.approx(of_answer["g"] / 2, rel=1e-5)
    z0 = max(sum(of_answer.values()) / 3, 0.0)
    assert metrics["eval/z0"] == pytest.approx(z0, rel=1e-5)
    names = ("loss", "z0", "auc", "margin", "desirable_reward", "undesirable_reward")
    assert set(metrics) == {f"eval/{name}" for name in names}


@pytest.mark.parametrize(("num_ranks", "max_tokens"), [(1, 1000), (3, 6)])
def test_every_held_out_step_counts_once(num_ranks: int, max_tokens: int) -> None:
    """The model takes a to d for wrong and e to h for right; the first errors of two responses of three are found."""
    groups = [
        steps(0, "hae", [1.0, 0.0, 1.0]),
        steps(1, "hh", [1.0, 1.0]),
        steps(2, "ha", [0.0, 0.0]),
    ]
    models = model(Role.REWARD, Head.TOKEN_SCORES, num_ranks)
    evaluator = StepEvaluator(
        models, PRM(PrmSection()), groups, TrainSection(batch_size=1, max_tokens_per_micro_batch=max_tokens)
    )
    metrics = evaluator.evaluate(1).metrics
    assert metrics["eval/num_steps"] == 7
    assert metrics["eval/accuracy"] == pytest.approx(6 / 7)
    assert metrics["eval/first_error"] == pytest.approx(2 / 3)


def steps(number: int, answer: str, labels: Sequence[float]) -> ScoredGroup:
    """A response whose every letter ends a step."""
    group = given_group(number, [answer], [0.0])
    mask = np.arange(len(answer) + 1) < len(answer)
    return replace(group, responses=(replace(group.responses[0], loss_mask=mask, step_labels=tuple(labels)),))
