"""KTO on the policy's own answers: each is labeled by its score against a threshold (Ethayarajh et al. 2024)."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

from rlhf.algorithms.kto import KTO, imbalance
from rlhf.algorithms.mismatched_responses import Judged, with_mismatched
from rlhf.algorithms.responses import ResponseTokens, describe
from rlhf.algorithms.sequences import join
from rlhf.config.algo import OnlineKtoSection
from rlhf.types import Example, Experience, Metrics, ScoredGroup, Signals

JUDGED_STEPS = 10


class OnlineKTO(KTO):
    """As kto, with labels made here: an answer is good where its score is above the threshold. An answer without a
    token (empty or aborted) has no label and counts in no mean; one exactly at a mean is left out, and counted.

    Ethayarajh et al. 2024, arXiv:2402.01306; labels from scores: as online DPO, with a threshold in place of a pair.
    """

    def __init__(self, section: OnlineKtoSection) -> None:
        super().__init__(section)
        self._threshold = section.threshold
        self._score = section.threshold_score
        self._num_empty = 0
        self._num_at_mean = 0
        self._labels: list[tuple[int, int]] = []
        """Good and bad answers of each step, until they are judged."""
        self._has_judged_weights = section.class_weights == "auto"

    def keep(self, group: ScoredGroup) -> bool:
        return True

    def select(self, groups: Sequence[ScoredGroup]) -> list[Example]:
        """One example an answer that is good or bad."""
        spoken = [with_tokens(group) for group in groups]
        self._num_empty += sum(len(group.rollouts) for group in groups) - sum(map(len, spoken))
        judged = self._judge(spoken)
        labeled = [one for one in judged if self._threshold == "fixed" or one.score != one.threshold]
        self._num_at_mean += len(judged) - len(labeled)
        if not self._has_judged_weights:
            good = sum(one.score >= one.threshold for one in labeled)
            self._labels.append((good, len(labeled) - good))
        return with_mismatched(labeled)

    def _judge(self, groups: Sequence[Sequence[Judged]]) -> list[Judged]:
        """All answers of all groups, each with its threshold."""
        if self._threshold == "group-mean":
            return [one for group in groups for one in held_against_mean(group)]
        everything = [one for group in groups for one in group]
        if self._threshold == "batch-mean":
            return held_against_mean(everything)
        return [replace(one, threshold=self._score) for one in everything]

    def credit(self, examples: Sequence[Example], signals: Sequence[Signals]) -> tuple[list[Experience], Metrics]:
        experiences, metrics = super().credit(examples, signals)
        answers = [ResponseTokens.of(example, signal) for example, signal in zip(examples, signals, strict=True)]
        left_out = {"labels/empty": float(self._num_empty), "labels/at_mean": float(self._num_at_mean)}
        self._num_empty = self._num_at_mean = 0
        return experiences, metrics + describe(answers) + Metrics(sums=left_out, warnings=self._judge_weights())

    def _judge_weights(self) -> tuple[str, ...]:
        """What there is to say, once, of given weights after the first steps' labels."""
        if self._has_judged_weights or len(self._labels) < JUDGED_STEPS:
            return ()
        self._has_judged_weights = True
        text = imbalance(self._section, *map(sum, zip(*self._labels, strict=True)))
        return () if text is None else (text,)


def with_tokens(group: ScoredGroup) -> list[Judged]:
    """The group's answers that hold a token to learn from."""
    return [
        Judged(
            prompt=group.prompt,
            rollout=rollout,
            score=reward.total,
            threshold=0.0,
            sampler_log_probs=rollout.log_probs,
        )
        for rollout, reward in zip(group.rollouts, group.rewards, strict=True)
        if join(group.prompt, rollout).loss_mask.any()
    ]


def held_against_mean(answers: Sequence[Judged]) -> list[Judged]:
    """Answers whose threshold is the mean of their scores, which is exact: equal scores are all at it."""
    threshold = mean(one.score for one in answers) if answers else 0.0
    return [replace(one, threshold=threshold) for one in answers]
