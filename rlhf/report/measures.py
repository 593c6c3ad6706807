"""Which metrics say how well a run did, and their values at its end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from rlhf.report.run_record import RunRecord

Points = Sequence[tuple[int, float]]
"""(step, value), in the order of the steps."""

MOST_AVERAGED = 20
"""Most steps over which a noisy metric is averaged; never more than a fifth of a run."""

RESULTS: dict[str, int] = {
    "eval/reward": 1,
    "eval/accuracy": 1,
    "eval/auc": 1,
    "eval/loss": -1,
    "reward/mean_all": 1,
    "pairs/accuracy": 1,
    "reward/accuracy": 1,
    "labels/auc": 1,
    "reward/loss": -1,
    "policy/loss": -1,
}
"""Metric -> 1 where more is better, -1 where less is better. The first ones say most: held-out rows come first."""
ONLINE = "reward/mean_all"
"""A metric that every online method has, and no other."""
OTHERS = (
    "kl/ref_per_response",
    "response/length",
    "response/truncated",
    "groups/zero_std",
    "policy/grad_norm",
    "mismatch/log_prob",
    "time/step",
    "throughput/tokens_per_s",
)
"""Metrics that explain a result, of which neither more nor less is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A metric of a run."""

    first: float
    last: float
    """The value at the end: the mean over the last `num_averaged` steps."""
    num_averaged: int
    error: float | None
    """Standard error of `last`, taking steps for independent; None where it is of one step."""
    best: float | None
    """The best value of one step; None of a metric of which neither more nor less is better."""
    best_step: int | None


def direction(metric: str, runs: Sequence[RunRecord]) -> int:
    """1 where more is better, -1 where less is better, 0 where neither is. The policy's loss says nothing about an
    online method."""
    if metric == "policy/loss" and any(ONLINE in run.metrics for run in runs):
        return 0
    return RESULTS.get(metric, 0)


def measured(points: Points, metric: str, sign: int) -> Measured | None:
    """A metric with these values; None without any. The values of evaluations and of single steps are not averaged."""
    if not points:
        return None
    values = [value for _, value in points]
    width = 1 if metric.startswith("eval/") else averaged_steps(len(values))
    window = values[-width:]
    best_step, best = max(points, key=lambda point: (sign * point[1], -point[0]))
    return Measured(
        first=fmean(values[:width]),
        last=fmean(window),
        num_averaged=width,
        error=stdev(window) / math.sqrt(width) if width > 1 else None,
        best=best if sign else None,
        best_step=best_step if sign else None,
    )


def averaged_steps(num_steps: int) -> int:
    """How many steps the mean at the beginning or end of a run is over."""
    return max(1, min(MOST_AVERAGED, num_steps // 5))
