"""Measuring on held-out rows: every row once, and means that weigh every row (token, pair) the same."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rlhf.algorithms.base import Algorithm
from rlhf.algorithms.held_out import held_out_metrics
from rlhf.algorithms.prm import judge_steps
from rlhf.config.run import TrainSection
from rlhf.errors import RlhfError
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, pack_tokens, plan_batches, unpack_scores
from rlhf.orchestrator.step.sources import Sampler, request_seed
from rlhf.orchestrator.step.token_scores import Models, token_outputs
from rlhf.types import FinishReason, FloatArray, Prompt, Role, RolloutRequest, Sampling, ScoredGroup, Signals


class Evaluator(Protocol):
    """Measures the policy as it is now."""

    def evaluate(self, version: int) -> dict[str, float]:
        """Figures by name. `version` is that of the live weights."""
        ...


class LikelihoodEvaluator:
    """How likely held-out demonstrations are: mean negative log-likelihood of a learned token."""

    def __init__(
        self, models: Models, algorithm: Algorithm, groups: Sequence[ScoredGroup], train: TrainSection
    ) -> None:
        self._engine = models.trained[Role.POLICY]
        self._examples = algorithm.select(groups)
        self._train = train

    def evaluate(self, version: int) -> dict[str, float]:
        learned = [
            log_probs[sequence.loss_mask]
            for example, arrays in zip(
                self._examples, token_outputs(self._engine, self._examples, self._train), strict=True
            )
            for sequence, log_probs in zip(example.sequences, arrays, strict=True)
        ]
        loss = -float(np.concatenate(learned).astype(np.float64).mean())
        return {"eval/loss": loss, "eval/perplexity": float(np.exp(min(loss, 50.0)))}


class PairEvaluator:
    """How often a reward model orders held-out answers as people did, over all pairs of each ranking."""

    def __init__(
        self, models: Models, algorithm: Algorithm, groups: Sequence[ScoredGroup], train: TrainSection
    ) -> None:
        self._engine = models.trained[Role.REWARD]
        self._examples = algorithm.select(groups)
        self._train = train

    def evaluate(self, version: int) -> dict[str, float]:
        plan = plan_batches(self._examples, MicroBatchLimits.of(self._train, self._engine.num_ranks))
        said = unpack_scores(plan, self._examples, self._engine.forward(pack_tokens(plan, self._examples)))
        gaps = np.concatenate([score_gaps(said[i], example.rewards) for i, example in enumerate(self._examples)])
        return describe_pairs(gaps)


class LabelEvaluator:
    """How well the implicit reward, beta * log(policy / reference), tells good held-out answers from bad ones."""

    def __init__(
        self, models: Models, algorithm: Algorithm, groups: Sequence[ScoredGroup], train: TrainSection
    ) -> None:
        self._models = models
        self._algorithm = algorithm
        self._examples = algorithm.select(groups)
        self._train = train

    def evaluate(self, version: int) -> dict[str, float]:
        assert self._models.reference is not None, "KTO has a reference"
        policy = token_outputs(self._models.trained[Role.POLICY], self._examples, self._train)
        reference = token_outputs(self._models.reference, self._examples, self._train)
        signals = [Signals(old_log_probs=old, ref_log_probs=ref) for old, ref in zip(policy, reference, strict=True)]
        _, credited = self._algorithm.credit(self._examples, signals)
        return {
            f"eval/{name.partition('/')[2]}": credited.sums[name] for name in LABEL_FIGURES if name in credited.sums
        }


LABEL_FIGURES = (
    "kto/loss",
    "kto/z0",
    "labels/desirable_reward",
    "labels/undesirable_reward",
    "labels/margin",
    "labels/auc",
)
"""What KTO's credit says about answers that is worth knowing of held-out ones."""


class PreferenceEvaluator:
    """How the policy's loss on pairs, and its implicit rewards, stand on held-out pairs: each pair counts once."""

    def __init__(
        self, models: Models, algorithm: Algorithm, groups: Sequence[ScoredGroup], train: TrainSection
    ) -> None:
        self._models = models
        self._algorithm = algorithm
        self._examples = algorithm.select(groups)
        self._train = train

    def evaluate(self, version: int) -> dict[str, float]:
        """Nothing where the held-out rows hold no pair."""
        if not self._examples:
            return {}
        experiences, _ = self._algorithm.credit(self._examples, self._measure())
        policy = self._models.trained[Role.POLICY]
        plan = plan_batches(self._examples, MicroBatchLimits.of(self._train, policy.num_ranks))
        batches = build_batches(plan, experiences, Role.POLICY)
        said = policy.forward(pack_tokens(plan, self._examples))
        figures = held_out_metrics(self._algorithm, batches, said).sums
        renamed = {f"eval/{name.partition('/')[2]}": value for name, value in figures.items()}
        return {**renamed, "eval/num_pairs": float(len(experiences))}

    def _measure(self) -> list[Signals]:
        """What the reference says, where the loss has one."""
        if self._models.reference is None:
            return [Signals()] * len(self._examples)
        said = token_outputs(self._models.reference, self._examples, self._train)
        return [Signals(ref_log_probs=arrays) for arrays in said]


class StepEvaluator:
    """How often a process reward model agrees with the labels of held-out steps, and finds an answer's first error."""

    def __init__(
        self, models: Models, algorithm: Algorithm, groups: Sequence[ScoredGroup], train: TrainSection
    ) -> None:
        self._engine = models.trained[Role.REWARD]
        self._examples = algorithm.select(groups)
        self._train = train

    def evaluate(self, version: int) -> dict[str, float]:
        said = token_outputs(self._engine, self._examples, self._train)
        scores = [
            scores[example.sequences[0].loss_mask].astype(np.float64)
            for example, (scores,) in zip(self._examples, said, strict=True)
        ]
        labels = [np.array(example.rewards, dtype=np.float64) for example in self._examples]
        return {f"eval/{name}": value for name, value in judge_steps(scores, labels).items()}


def score_gaps(scores: Sequence[float], rewards: Sequence[float]) -> FloatArray:
    """Score of the better answer minus score of the worse, for each pair of answers whose rewards differ."""
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
    """How held-out prompts are answered: one answer each, scored by the run's reward source."""

    def __init__(self, sampler: Sampler, prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> None:
        self._sampler = sampler
        self._prompts = prompts
        self._sampling = sampling
        self._seed = seed

    def evaluate(self, version: int) -> dict[str, float]:
        """Raises RlhfError where an answer was sampled from older weights than `version`."""
        rollouts = self._sampler.generate(self._requests())
        stale = [rollout for rollout in rollouts if rollout.weight_version != version]
        if stale:
            raise RlhfError(
                f"evaluation: {len(stale)} of {len(rollouts)} answers were sampled from weights of version "
                f"{stale[0].weight_version}, the policy is at {version}"
            )
        _, rewards = self._sampler.score(self._prompts, rollouts)
        names = sorted({name for reward in rewards for name in reward.parts})
        parts = {name: [reward.parts[name] for reward in rewards if name in reward.parts] for name in names}
        return {
            "eval/reward": float(np.mean([reward.total for reward in rewards])),
            "eval/length": float(np.mean([len(rollout.token_ids) for rollout in rollouts])),
            "eval/truncated": float(np.mean([r.finish_reason is FinishReason.LENGTH for r in rollouts])),
            **{f"eval/source/{name}": float(np.mean(values)) for name, values in parts.items()},
        }

    def _requests(self) -> list[RolloutRequest]:
        """The same seeds at every evaluation, so that two of them differ by the weights alone."""
        return [
            RolloutRequest(
                id=f"eval/{index}/{prompt.id}",
                prompt_id=prompt.id,
                prompt_token_ids=prompt.token_ids,
                seed=request_seed(self._seed, "eval", prompt.id, index),
                sampling=self._sampling,
            )
            for index, prompt in enumerate(self._prompts)
        ]
