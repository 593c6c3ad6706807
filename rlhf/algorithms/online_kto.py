"""KTO on the policy's own responses, each labeled by its score against a threshold (Ethayarajh et al. 2024)."""

from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import mean

from pydantic import TypeAdapter, ValidationError

from rlhf.algorithms.kto import KTO, imbalance
from rlhf.algorithms.mismatched_responses import LabeledResponse, with_mismatched
from rlhf.algorithms.responses import ResponseTokens, ref_kl_metrics
from rlhf.algorithms.sequences import is_empty
from rlhf.config.algo import OnlineKtoSection
from rlhf.errors import CheckpointError
from rlhf.types import Example, Experience, Json, Metrics, Prompt, Response, ScoredGroup, Signals

WEIGHT_CHECK_STEPS = 10

Scored = tuple[Prompt, Response, float]


class OnlineKTO(KTO):
    """As kto, with labels made here: a response is desirable where its score is above the threshold. A response without
    a token (empty or aborted) has no label and counts in no mean; one exactly at a mean is left out, and counted.

    Ethayarajh et al. 2024, arXiv:2402.01306; labels from scores: as online DPO, with a threshold in place of a pair.
    """

    def __init__(self, section: OnlineKtoSection) -> None:
        super().__init__(section)
        self._threshold = section.threshold
        self._score = section.threshold_score
        self._num_empty = 0
        self._num_at_mean = 0
        self._label_counts: list[tuple[int, int]] = []
        """Desirable and undesirable responses of each step, until the weights were checked."""
        self._has_checked_weights = section.class_weights == "auto"

    def keep(self, group: ScoredGroup) -> bool:
        return True

    def select(self, groups: Sequence[ScoredGroup]) -> list[Example]:
        """One example per labeled response."""
        non_empty = [scored_responses(group) for group in groups]
        scored = list(chain.from_iterable(non_empty))
        self._num_empty += sum(len(group.responses) for group in groups) - len(scored)
        labeled = [
            LabeledResponse(prompt=prompt, response=response, score=score, label=score >= threshold)
            for (prompt, response, score), threshold in zip(scored, self._thresholds(non_empty), strict=True)
            if self._threshold == "fixed" or score != threshold
        ]
        self._num_at_mean += len(scored) - len(labeled)
        if not self._has_checked_weights:
            num_desirable = sum(one.label for one in labeled)
            self._label_counts.append((num_desirable, len(labeled) - num_desirable))
        return with_mismatched(labeled)

    def _thresholds(self, groups: Sequence[Sequence[Scored]]) -> list[float]:
        """The threshold of each response, in order: its group's mean score, the batch's, or the fixed score."""
        if self._threshold == "group-mean":
            return [threshold for group in groups for threshold in [mean_score(group)] * len(group)]
        everything = list(chain.from_iterable(groups))
        threshold = mean_score(everything) if self._threshold == "batch-mean" else self._score
        return [threshold] * len(everything)

    def credit(self, examples: Sequence[Example], signals: Sequence[Signals]) -> tuple[list[Experience], Metrics]:
        experiences, metrics = super().credit(examples, signals)
        responses = [ResponseTokens.of(example, signal) for example, signal in zip(examples, signals, strict=True)]
        left_out = {"labels/empty": float(self._num_empty), "labels/at_mean": float(self._num_at_mean)}
        self._num_empty = self._num_at_mean = 0
        return experiences, metrics + ref_kl_metrics(responses) + Metrics(sums=left_out, warnings=self._check_weights())

    def state(self) -> dict[str, Json]:
        counts: list[Json] = [list(counts) for counts in self._label_counts]
        return {"label_counts": counts, "has_checked_weights": self._has_checked_weights}

    def restore(self, state: Mapping[str, Json]) -> None:
        counts = state.get("label_counts", [])
        try:
            self._label_counts = TypeAdapter(list[tuple[int, int]]).validate_python(counts)
        except ValidationError as error:
            raise CheckpointError(f"algorithm state: label_counts: not pairs of counts (got {counts!r}).") from error
        self._has_checked_weights |= state.get("has_checked_weights") is True

    def _check_weights(self) -> tuple[str, ...]:
        """A warning, once, where after the first steps the given weights do not balance the two labels."""
        if self._has_checked_weights or len(self._label_counts) < WEIGHT_CHECK_STEPS:
            return ()
        self._has_checked_weights = True
        text = imbalance(self._section, *map(sum, zip(*self._label_counts, strict=True)))
        return () if text is None else (text,)


def scored_responses(group: ScoredGroup) -> list[Scored]:
    """The group's responses that hold a token to learn from, with their prompt and score."""
    return [
        (group.prompt, response, reward.total)
        for response, reward in zip(group.responses, group.rewards, strict=True)
        if not is_empty(group.prompt, response)
    ]


def mean_score(scored: Sequence[Scored]) -> float:
    """The mean of the scores, computed exactly, so that equal scores are all at it; 0 for none."""
    return mean(score for _, _, score in scored) if scored else 0.0
