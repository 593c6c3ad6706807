"""Asking the models about examples: which pass each example goes through, and what the models said."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from rlhf.engines.base import EmaReferenceScorer, TokenScorer, TrainEngine
from rlhf.orchestrator.step.batching import (
    BatchPlan,
    HasSequences,
    Limits,
    merge_plans,
    pack_tokens,
    plan_batches,
    split_minibatches,
    unpack_tokens,
)
from rlhf.orchestrator.step.waiting import gather, in_thread
from rlhf.types import Example, Experience, FloatArray, Role, Signals

PerExample = Mapping[int, tuple[FloatArray, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The models of a run: those that learn, by role, and the reference where the algorithm wants one."""

    trained: Mapping[Role, TrainEngine]
    reference: TokenScorer | None = None
    ema_reference: EmaReferenceScorer | None = None
    """The reference, where it follows the policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Portions:
    """In which portions a rollout batch is measured and learned from."""

    batch_size: int
    """Examples in one optimizer step, over all ranks."""
    max_tokens: int
    """Most tokens in one forward pass of one rank."""
    max_examples: int | None = None
    """Most examples in one forward pass of one rank; None: only tokens count."""
    seed: int = 0

    def limits(self, num_ranks: int) -> Limits:
        """Bounds of one model's forward passes."""
        return Limits(num_ranks=num_ranks, max_tokens=self.max_tokens, max_examples=self.max_examples)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Each trained role's passes over one rollout batch: one plan a minibatch, the same minibatches for every role."""

    by_role: Mapping[Role, tuple[BatchPlan, ...]]

    @property
    def num_minibatches(self) -> int:
        """Optimizer steps in one pass over the batch."""
        return max(len(plans) for plans in self.by_role.values())


def plan_step(step: int, examples: Sequence[Example], models: Models, portions: Portions) -> StepPlan:
    """Deal the examples into minibatches by the run's seed and the step, and plan each role's passes over them."""
    return _plan(
        split_minibatches(len(examples), portions.batch_size, [portions.seed, step]), examples, models, portions
    )


def plan_learning(plan: StepPlan, experiences: Sequence[Experience], models: Models, portions: Portions) -> StepPlan:
    """The minibatches of `plan`, packed for what is learned from: an experience may hold fewer sequences than its
    example, of which some were only to be measured (KTO's). Where it holds the same, this is the same plan."""
    minibatches = [part.indices for part in next(iter(plan.by_role.values()))]
    return _plan(minibatches, experiences, models, portions)


def _plan(
    minibatches: Sequence[Sequence[int]], items: Sequence[HasSequences], models: Models, portions: Portions
) -> StepPlan:
    return StepPlan(
        by_role={
            role: tuple(plan_batches(items, portions.limits(engine.num_ranks), indices) for indices in minibatches)
            for role, engine in models.trained.items()
        }
    )


def score_tokens(
    asked: frozenset[str],
    examples: Sequence[Example],
    plan: StepPlan,
    models: Models,
    portions: Portions,
    *,
    timeout_s: float,
) -> list[Signals]:
    """What the models say about each example, all models at the same time.

    The policy and the critic use the plan that training will use, so that both passes do the same arithmetic.
    Raises StallError where a model does not answer within `timeout_s`.
    """
    jobs: dict[str, Future[PerExample]] = {}
    if "old_log_probs" in asked:
        merged = merge_plans(plan.by_role[Role.POLICY])
        jobs["old_log_probs"] = in_thread(_forward, models.trained[Role.POLICY], merged, examples)
    if "values" in asked:
        merged = merge_plans(plan.by_role[Role.CRITIC])
        jobs["values"] = in_thread(_forward, models.trained[Role.CRITIC], merged, examples)
    if "ref_log_probs" in asked:
        if models.reference is None:
            raise ValueError("the algorithm asks for ref_log_probs, and no reference was started")
        own = plan_batches(examples, portions.limits(models.reference.num_ranks))
        jobs["ref_log_probs"] = in_thread(_forward, models.reference, own, examples)
    said = gather(jobs, phase="log_probs", timeout_s=timeout_s)
    return [Signals(**{name: arrays[i] for name, arrays in said.items()}) for i in range(len(examples))]


def token_outputs(engine: TokenScorer, examples: Sequence[Example], portions: Portions) -> list[tuple[FloatArray, ...]]:
    """What one model says about each token of each example's sequences, outside of a step (evaluation)."""
    plan = plan_batches(examples, portions.limits(engine.num_ranks))
    said = _forward(engine, plan, examples)
    return [said[i] for i in range(len(examples))]


def _forward(engine: TokenScorer, plan: BatchPlan, examples: Sequence[Example]) -> PerExample:
    return unpack_tokens(plan, examples, engine.forward(pack_tokens(plan, examples)))
