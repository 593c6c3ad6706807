"""Evaluation on held-out rows: each row is used once, and means give each row (or token, or pair) the same weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rlhf.algorithms.base import Algorithm
from rlhf.algorithms.held_out import held_out_metrics
from rlhf.algorithms.prm import judge_steps
from rlhf.config.run import TrainSection
from rlhf.engines.base import TokenScorer
from rlhf.errors import RlhfError
from rlhf.orchestrator.step.batching import (
    BatchPlan,
    MicroBatchLimits,
    build_batches,
    pack_tokens,
    plan_batches,
    unpack_scores,
)
from rlhf.orchestrator.step.sampled_metrics import logged_means
from rlhf.orchestrator.step.sampler import Sampler, request_seed
from rlhf.orchestrator.step.token_scores import Models, token_outputs
from rlhf.types import (
    FinishReason,
    FloatArray,
    Prompt,
    Reward,
    Role,
    Rollout,
    RolloutRequest,
    Sampling,
    ScoredGroup,
    Signal,
    Signals,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation found: metrics by name, and the responses that it sampled, if it samples."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    responses: Sequence[ScoredGroup] = ()


class Evaluator(Protocol):
    """Measures the trained model as it is now."""

    def evaluate(self, version: int) -> Evaluation:
        """`version` is the version of the live weights."""
        ...


class HeldOutEvaluator:
    """What the evaluators on a data set's held-out rows share: the examples that the algorithm selects from them."""

    def __init__(
        self, models: Models, algorithm: Algorithm, groups: Sequence[ScoredGroup], train: TrainSection
    ) -> None:
        """`algorithm` must not be the one that trains: held-out rows must not enter its statistics."""
        self._models = models
        self._algorithm = algorithm
        self._examples = algorithm.select(groups)
        self._train = train

    def _plan(self, engine: TokenScorer) -> BatchPlan:
        """The forward passes of `engine` over the examples."""
        return plan_batches(self._examples, MicroBatchLimits.of(self._train, engine.num_ranks))

    def _token_outputs(self, engine: TokenScorer) -> list[tuple[FloatArray, ...]]:
        """One array for each sequence of each example, with the engine's output for each token."""
        return token_outputs(engine, self._examples, self._train)


class LikelihoodEvaluator(HeldOutEvaluator):
    """How likely held-out demonstrations are: mean negative log-likelihood of a learned token."""

    def evaluate(self, version: int) -> Evaluation:
        outputs = self._token_outputs(self._models.trained[Role.POLICY])
        learned = [
            log_probs[sequence.loss_mask]
            for example, arrays in zip(self._examples, outputs, strict=True)
            for sequence, log_probs in zip(example.sequences, arrays, strict=True)
        ]
        loss = -float(np.concatenate(learned).astype(np.float64).mean())
        return Evaluation(metrics={"eval/loss": loss, "eval/perplexity": float(np.exp(min(loss, 50.0)))})


class PairEvaluator(HeldOutEvaluator):
    """How often a reward model orders held-out responses as people did, over all pairs of each ranking."""

    def evaluate(self, version: int) -> Evaluation:
        engine = self._models.trained[Role.REWARD]
        plan = self._plan(engine)
        scores = unpack_scores(plan, self._examples, engine.forward(pack_tokens(plan, self._examples)))
        gaps = np.concatenate([score_gaps(scores[i], example.rewards) for i, example in enumerate(self._examples)])
        return Evaluation(metrics=describe_pairs(gaps))


class LabelEvaluator(HeldOutEvaluator):
    """How well the implicit reward, beta * log(policy / reference), separates good held-out responses from bad ones."""

    def evaluate(self, version: int) -> Evaluation:
        assert self._models.reference is not None, "KTO has a reference"
        policy = self._token_outputs(self._models.trained[Role.POLICY])
        reference = self._token_outputs(self._models.reference)
        signals = [
            {Signal.OLD_LOG_PROBS: old, Signal.REF_LOG_PROBS: ref} for old, ref in zip(policy, reference, strict=True)
        ]
        _, credited = self._algorithm.credit(self._examples, signals)
        found = [name for name in LABEL_METRICS if name in credited.sums]
        return Evaluation(metrics={f"eval/{name.partition('/')[2]}": credited.sums[name] for name in found})


LABEL_METRICS = (
    "kto/loss",
    "kto/z0",
    "labels/desirable_reward",
    "labels/undesirable_reward",
    "labels/margin",
    "labels/auc",
)
"""The metrics of KTO's credit that are logged for held-out responses too."""


class LossEvaluator(HeldOutEvaluator):
    """The metrics of the algorithm's own loss on held-out rows, with the trained model as it is."""

    def evaluate(self, version: int) -> Evaluation:
        """Empty where the held-out rows hold no example."""
        if not self._examples:
            return Evaluation()
        (role,) = self._algorithm.needs.trains
        experiences, _ = self._algorithm.credit(self._examples, self._signals())
        engine = self._models.trained[role]
        plan = self._plan(engine)
        batches = build_batches(plan, experiences, role)
        outputs = engine.forward(pack_tokens(plan, self._examples))
        metrics = held_out_metrics(self._algorithm, batches, outputs).sums
        return Evaluation(metrics={f"eval/{name.partition('/')[2]}": value for name, value in metrics.items()})

    def _signals(self) -> list[Signals]:
        """The reference's log-probs, where the loss needs a reference."""
        if self._models.reference is None:
            return [{}] * len(self._examples)
        return [{Signal.REF_LOG_PROBS: arrays} for arrays in self._token_outputs(self._models.reference)]


class PreferenceEvaluator(LossEvaluator):
    """The policy's loss and its implicit rewards on held-out pairs: each pair counts once."""

    def evaluate(self, version: int) -> Evaluation:
        """Empty where the held-out rows hold no pair."""
        if not self._examples:
            return Evaluation()
        metrics = super().evaluate(version).metrics
        return Evaluation(metrics={**metrics, "eval/num_pairs": float(len(self._examples))})


class StepEvaluator(HeldOutEvaluator):
    """How often a process reward model agrees with the labels of held-out steps, and finds a response's first error."""

    def evaluate(self, version: int) -> Evaluation:
        outputs = self._token_outputs(self._models.trained[Role.REWARD])
        masks = [example.sequences[0].loss_mask for example in self._examples]
        scores = [array[mask].astype(np.float64) for mask, (array,) in zip(masks, outputs, strict=True)]
        labels = [
            example.token_targets[0][mask].astype(np.float64)
            for mask, example in zip(masks, self._examples, strict=True)
        ]
        return Evaluation(metrics={f"eval/{name}": value for name, value in judge_steps(scores, labels).items()})


def score_gaps(scores: Sequence[float], rewards: Sequence[float]) -> FloatArray:
    """Score of the better response minus score of the worse one, for each pair of responses whose rewards differ."""
    pairs = [(i, j) for i in range(len(rewards)) for j in range(len(rewards)) if rewards[i] > rewards[j]]
    return np.array([scores[i] - scores[j] for i, j in pairs], dtype=np.float32)


def describe_pairs(gaps: FloatArray) -> dict[str, float]:
    """Accuracy (equal scores count half) and Bradley-Terry loss, -log sigmoid(gap), over all pairs."""
    wide = gaps.astype(np.float64)
    return {
        "eval/accuracy": float(((wide > 0) + 0.5 * (wide == 0)).mean()),
        "eval/loss": float(np.logaddexp(0.0, -wide).mean()),
        "eval/margin": float(wide.mean()),
        "eval/num_pairs": float(len(wide)),
    }


class SampleEvaluator:
    """The mean reward of the responses to held-out prompts: one for each, scored by the run's reward source."""

    def __init__(self, sampler: Sampler, prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> None:
        self._sampler = sampler
        self._prompts = prompts
        self._sampling = sampling
        self._seed = seed

    def evaluate(self, version: int) -> Evaluation:
        """Raises RlhfError where a response was sampled from older weights than `version`."""
        rollouts = self._sampler.generate(self._requests(version))
        stale = [rollout for rollout in rollouts if rollout.is_sampled and rollout.weight_version != version]
        if stale:
            raise RlhfError(
                f"evaluation: {len(stale)} of {len(rollouts)} responses were sampled from weights of version "
                f"{stale[0].weight_version}, the policy is at {version}"
            )
        texts, rewards = self._sampler.score(self._prompts, rollouts)
        responses = [
            ScoredGroup(prompt=prompt, responses=(rollout,), texts=(text,), rewards=(reward,))
            for prompt, rollout, text, reward in zip(self._prompts, rollouts, texts, rewards, strict=True)
        ]
        return Evaluation(metrics=describe_samples(rollouts, rewards), responses=responses)

    def _requests(self, version: int) -> list[RolloutRequest]:
        """The same seeds at every evaluation, so that two of them differ by the weights alone; and other ids: engines
        may still be busy with an evaluation that failed."""
        return [
            RolloutRequest(
                id=f"eval/{version}/{index}/{prompt.id}",
                prompt_id=prompt.id,
                prompt_token_ids=prompt.token_ids,
                seed=request_seed(self._seed, "eval", prompt.id, index),
                sampling=self._sampling,
            )
            for index, prompt in enumerate(self._prompts)
        ]


def describe_samples(rollouts: Sequence[Rollout], rewards: Sequence[Reward]) -> dict[str, float]:
    """Means over the responses of an evaluation."""
    totals = [reward.total for reward in rewards if reward.is_scored]
    names = sorted({name for reward in rewards for name in reward.parts})
    parts = {name: [reward.parts[name] for reward in rewards if name in reward.parts] for name in names}
    return {
        **({"eval/reward": float(np.mean(totals))} if totals else {}),
        "eval/unscored": 1.0 - len(totals) / len(rewards),
        "eval/length": float(np.mean([len(rollout.token_ids) for rollout in rollouts])),
        "eval/truncated": float(np.mean([r.finish_reason is FinishReason.LENGTH for r in rollouts])),
        **{f"eval/source/{name}": float(np.mean(values)) for name, values in parts.items()},
        **{f"eval/reward/{name}": mean for name, mean in logged_means(rewards).items()},
    }
