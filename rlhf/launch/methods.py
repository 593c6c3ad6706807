"""How an offline run evaluates on its held-out rows."""

from collections.abc import Callable, Mapping, Sequence

from rlhf.algorithms.base import Algorithm
from rlhf.config.commands import RowKind, TrainConfig, method_of
from rlhf.config.run import TrainSection
from rlhf.orchestrator.evaluation import (
    Evaluator,
    LabelEvaluator,
    LikelihoodEvaluator,
    LossEvaluator,
    PairEvaluator,
    PreferenceEvaluator,
    StepEvaluator,
)
from rlhf.orchestrator.step.token_scores import Models
from rlhf.types import ScoredGroup

OfflineEvaluator = Callable[[Models, Algorithm, Sequence[ScoredGroup], TrainSection], Evaluator]

EVALUATORS: Mapping[tuple[RowKind, str], OfflineEvaluator] = {
    (RowKind.DEMONSTRATIONS, "policy"): LikelihoodEvaluator,
    (RowKind.PREFERENCES, "policy"): PreferenceEvaluator,
    (RowKind.PREFERENCES, "reward"): PairEvaluator,
    (RowKind.LABELED, "policy"): LabelEvaluator,
    (RowKind.STEPS, "reward"): StepEvaluator,
}
"""The kind of rows and the model that the run trains -> its evaluator. All others are evaluated by their loss."""


def offline_evaluator(config: TrainConfig) -> OfflineEvaluator:
    """The class that evaluates an offline run's model on held-out rows."""
    method = method_of(config)
    return EVALUATORS.get((method.rows, method.model), LossEvaluator)
