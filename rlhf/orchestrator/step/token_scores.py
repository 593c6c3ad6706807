"""The forward passes before credit: log-probs and values of each example's tokens, by the models of the run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf.config.run import TrainSection
from rlhf.engines.base import EmaReferenceScorer, TokenScorer, TrainEngine
from rlhf.orchestrator.step.batching import (
    BatchPlan,
    HasSequences,
    MicroBatchLimits,
    count_tokens,
    merge_plans,
    pack_tokens,
    plan_batches,
    split_minibatches,
    unpack_tokens,
    with_own_routes,
)
from rlhf.orchestrator.step.waiting import gather, in_thread
from rlhf.types import SCORED_BY, Example, Experience, FloatArray, Role, Signal, Signals


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The models of a run: those that learn, by role, and the reference where the algorithm wants one."""

    trained: Mapping[Role, TrainEngine]
    reference: TokenScorer | None = None
    ema_reference: EmaReferenceScorer | None = None
    """The reference, where it follows the policy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Each trained role's passes over one rollout batch: one plan per minibatch, equal minibatches for every role."""

    by_role: Mapping[Role, tuple[BatchPlan, ...]]
    num_tokens: Sequence[int]
    """Of each example: all that the plans depend on."""

    @property
    def num_minibatches(self) -> int:
        """Optimizer steps in one pass over the batch."""
        return max(len(plans) for plans in self.by_role.values())


def plan_step(step: int, examples: Sequence[Example], models: Models, train: TrainSection, seed: int) -> StepPlan:
    """Split the examples into mini-batches by the run's seed and the step, and plan each role's passes over them."""
    return _plan(split_minibatches(len(examples), train.batch_size, [seed, step]), examples, models, train)


def plan_learning(plan: StepPlan, experiences: Sequence[Experience], models: Models, train: TrainSection) -> StepPlan:
    """The minibatches of `plan`, packed for learning. An experience may hold fewer sequences than its example
    (KTO's mismatched responses are scored, not learned from); otherwise this is the same plan."""
    if count_tokens(experiences) == plan.num_tokens:
        return plan
    minibatches = [part.indices for part in next(iter(plan.by_role.values()))]
    return _plan(minibatches, experiences, models, train)


def _plan(
    minibatches: Sequence[Sequence[int]], items: Sequence[HasSequences], models: Models, train: TrainSection
) -> StepPlan:
    limits = {role: MicroBatchLimits.of(train, engine.num_ranks) for role, engine in models.trained.items()}
    # Roles with equally many ranks, as usual, share their plans.
    plans = {one: tuple(plan_batches(items, one, indices) for indices in minibatches) for one in limits.values()}
    return StepPlan(by_role={role: plans[one] for role, one in limits.items()}, num_tokens=count_tokens(items))


def score_tokens(
    signals: frozenset[Signal],
    examples: Sequence[Example],
    plan: StepPlan,
    models: Models,
    train: TrainSection,
) -> list[Signals]:
    """Compute the signals of each example, all models at the same time.

    The policy and the critic use the plan that training will use, so that both passes do the same arithmetic.
    Raises StallError where a model takes longer than `train.step_timeout_s`.
    """
    scorers = {signal: _scorer(signal, models) for signal in SCORED_BY if signal in signals}
    plans = {
        signal: merge_plans(plan.by_role[SCORED_BY[signal]])
        if SCORED_BY[signal] in models.trained
        else plan_batches(examples, MicroBatchLimits.of(train, scorer.num_ranks))
        for signal, scorer in scorers.items()
    }
    # Packed in this thread: memory that another thread has freed is of no use to credit, which comes next.
    packed = {one: pack_tokens(one, examples) for one in set(plans.values())}
    inputs = {
        signal: packed[one] if SCORED_BY[signal] is Role.POLICY else [with_own_routes(tokens) for tokens in packed[one]]
        for signal, one in plans.items()
    }
    jobs = {signal: in_thread(scorer.forward, inputs[signal]) for signal, scorer in scorers.items()}
    outputs = {
        signal: unpack_tokens(plans[signal], examples, output)
        for signal, output in gather(jobs, phase="log_probs", timeout_s=train.step_timeout_s).items()
    }
    return [{signal: arrays[i] for signal, arrays in outputs.items()} for i in range(len(examples))]


def _scorer(signal: Signal, models: Models) -> TokenScorer:
    """The model that computes a signal."""
    role = SCORED_BY[signal]
    if role in models.trained:
        return models.trained[role]
    if role is not Role.REFERENCE or models.reference is None:
        raise ValueError(f"the algorithm needs {signal}, and no {role} was started")
    return models.reference


def token_outputs(
    engine: TokenScorer, examples: Sequence[Example], train: TrainSection
) -> list[tuple[FloatArray, ...]]:
    """One model's per-token output [n] for each sequence of each example, outside of a step (evaluation)."""
    plan = plan_batches(examples, MicroBatchLimits.of(train, engine.num_ranks))
    outputs = unpack_tokens(plan, examples, engine.forward(pack_tokens(plan, examples)))
    return [outputs[i] for i in range(len(examples))]
