"""What models say about a step's examples before it is learned from, and how far sampler and trainer are apart.

Old log-probs need no pass of their own where the policy makes only one pass over a rollout batch to learn from it, with
the weights from before the step: that pass gives them, before the weights change.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from rlhf.algorithms.needs import Needs
from rlhf.config.run import TrainSection
from rlhf.orchestrator.run.schedule import RunLength
from rlhf.orchestrator.step.mismatch import MismatchWatch, log_prob_mismatch, mismatch_metrics
from rlhf.orchestrator.step.token_scores import Models, StepPlan, score_tokens
from rlhf.types import Example, FloatArray, Role, Signal, Signals

TakeOutputs: TypeAlias = Callable[[Sequence[tuple[FloatArray, ...]]], None]
"""Gets the policy's outputs for each experience, one array [n] for each of its sequences."""


@dataclass(kw_only=True)
class StepScores:
    """Signals of each example. They lack the old log-probs until `take_old_log_probs`, where that is not None, has got
    them from the pass that learns; `mismatch` is empty until then."""

    signals: Sequence[Signals]
    mismatch: dict[str, float] = field(default_factory=dict)
    take_old_log_probs: TakeOutputs | None = None


class StepScorer:
    """Computes the signals that an algorithm needs."""

    def __init__(
        self, needs: Needs, models: Models, train: TrainSection, length: RunLength, watch: MismatchWatch
    ) -> None:
        self._needs = needs
        self._models = models
        self._train = train
        self._length = length
        self._watch = watch

    def score(self, step: int, examples: Sequence[Example], plan: StepPlan) -> StepScores:
        """Compute them. Raises NumericsError, as `take_old_log_probs` does, where sampler and trainer disagree by too
        much; and StallError."""
        are_late = self._are_late(step, plan)
        wanted = self._needs.signals - {Signal.OLD_LOG_PROBS} if are_late else self._needs.signals
        scores = StepScores(signals=score_tokens(wanted, examples, plan, self._models, self._train))

        def compare() -> None:
            gap = log_prob_mismatch(examples, scores.signals)
            scores.mismatch = mismatch_metrics(gap, self._train.mismatch_band)
            self._watch.check(step, scores.mismatch)

        def take(outputs: Sequence[tuple[FloatArray, ...]]) -> None:
            both = zip(scores.signals, outputs, strict=True)
            scores.signals = [{**signals, Signal.OLD_LOG_PROBS: old} for signals, old in both]
            compare()

        if are_late:
            scores.take_old_log_probs = take
        else:
            compare()
        return scores

    def _are_late(self, step: int, plan: StepPlan) -> bool:
        """Whether the old log-probs of the step come from the pass that learns."""
        is_only_pass = self._length.num_epochs == plan.num_minibatches == 1 and self._length.learns(Role.POLICY, step)
        is_allowed = self._train.fuse_old_log_probs and self._needs.late_old_log_probs
        return is_only_pass and is_allowed and Signal.OLD_LOG_PROBS in self._needs.signals
