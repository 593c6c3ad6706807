"""How an offline run loads its rows and evaluates on them: one entry for each kind of rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rlhf.algorithms.base import Algorithm
from rlhf.config.commands import TrainConfig, method_of
from rlhf.config.data import DataSection, RowKind
from rlhf.config.run import TrainSection
from rlhf.engines.base import Tokenizer
from rlhf.orchestrator.data import (
    DataSplit,
    load_demonstrations,
    load_labeled,
    load_preferences,
    load_steps,
)
from rlhf.orchestrator.evaluation import (
    Evaluator,
    LabelEvaluator,
    LikelihoodEvaluator,
    PairEvaluator,
    PreferenceEvaluator,
    StepEvaluator,
)
from rlhf.orchestrator.step.token_scores import Models
from rlhf.types import ScoredGroup

Loader = Callable[[DataSection, Tokenizer], DataSplit[ScoredGroup]]
OfflineEvaluator = Callable[[Models, Algorithm, Sequence[ScoredGroup], TrainSection], Evaluator]


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineRows:
    """How rows of one kind are loaded and evaluated."""

    load: Loader
    evaluators: Mapping[str, OfflineEvaluator]
    """The model that the run trains (policy or reward) -> its evaluator."""


OFFLINE_ROWS: Mapping[RowKind, OfflineRows] = {
    RowKind.DEMONSTRATIONS: OfflineRows(load=load_demonstrations, evaluators={"policy": LikelihoodEvaluator}),
    RowKind.PREFERENCES: OfflineRows(
        load=load_preferences, evaluators={"policy": PreferenceEvaluator, "reward": PairEvaluator}
    ),
    RowKind.LABELED: OfflineRows(load=load_labeled, evaluators={"policy": LabelEvaluator}),
    RowKind.STEPS: OfflineRows(load=load_steps, evaluators={"reward": StepEvaluator}),
}


def load_offline(config: TrainConfig, tokenizer: Tokenizer) -> DataSplit[ScoredGroup]:
    """Read, check and tokenize the rows of an offline run. Raises DataError."""
    return OFFLINE_ROWS[method_of(config).rows].load(config.data, tokenizer)


def offline_evaluator(config: TrainConfig) -> OfflineEvaluator:
    """The class that evaluates an offline run's model on held-out rows."""
    method = method_of(config)
    return OFFLINE_ROWS[method.rows].evaluators[method.model]
