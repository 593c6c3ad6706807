"""Which of several runs did best, by which metric, and whether noise could explain it."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import stdev

from rlhf.report.config_difference import config_difference
from rlhf.report.measures import RESULTS, Measured, direction, measured
from rlhf.report.responses_file import read_responses, recorded_steps
from rlhf.report.run_record import RunRecord

CERTAIN = 2.0
"""Standard errors beyond which a difference is more than noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The best run and the second best, by one metric."""

    metric: str
    winner: int
    """Its place among the runs."""
    second: int
    values: tuple[float, float]
    """Of the winner and of the second, at the end of each."""
    difference: float
    """Between these, above 0 where the winner is better."""
    error: float | None
    """Standard error of the difference; None where it cannot be known."""
    basis: str
    """What the values are means of."""

    @property
    def is_clear(self) -> bool:
        """Whether the difference is beyond noise, as far as its error is known."""
        return self.difference > 0 and (self.error is None or self.difference > CERTAIN * self.error)


def compare(runs: Sequence[RunRecord]) -> Comparison | None:
    """Compare by the metric that says most among those that every run has; None without such a metric."""
    for metric in RESULTS:
        sign = direction(metric, runs)
        found = [measured(run.series(metric), metric, sign) for run in runs]
        ends = [one for one in found if one is not None]
        if sign and len(ends) == len(runs):
            return _ranked(metric, sign, runs, ends)
    return None


def cautions(runs: Sequence[RunRecord], comparison: Comparison) -> list[str]:
    """Why the values of the runs may not be comparable."""
    differing = config_difference(runs)
    found = []
    if "reward" in comparison.metric and (keys := _within(differing, "reward.")):
        found.append(f"the runs have different reward settings ({keys}): equal responses may get different rewards")
    if comparison.metric.startswith("eval/") and (keys := _within(differing, "data.eval", "data.path", "run.seed")):
        found.append(f"the held-out rows may differ ({keys})")
    lasts = [run.last_step for run in runs]
    if len(set(lasts)) > 1:
        found.append("the runs end at different steps: " + ", ".join(map(str, lasts)))
    return found


def result_lines(found: Comparison | None, doubts: Sequence[str], names: Sequence[str]) -> list[str]:
    """Which run did best and by how much, and why that may not be so. `names` are those of the runs."""
    if found is None:
        return ["The runs have no metric in common that says which of them did better."]
    winner, second = names[found.winner], names[found.second]
    noise = "" if found.error is None else f" ± {found.error:.2g}"
    values = f"{found.metric} {found.values[0]:.4g} against {found.values[1]:.4g} of {second}"
    difference = f"{values}: {found.difference:.3g}{noise} better ({found.basis})"
    if found.is_clear:
        first = f"{winner} is ahead: {difference}."
    elif found.difference == 0:
        first = f"No difference: {found.metric} is {found.values[0]:.4g} in {winner} and {second} ({found.basis})."
    else:
        first = f"No clear winner: {winner} has {difference}, which noise can explain."
    return [first, *(f"Caution: {line}." for line in doubts)]


def _within(differing: Iterable[str], *prefixes: str) -> str:
    names = [name for name in differing if name.startswith(prefixes)]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _ranked(metric: str, sign: int, runs: Sequence[RunRecord], ends: Sequence[Measured]) -> Comparison:
    winner, second = sorted(range(len(runs)), key=lambda place: -sign * ends[place].last)[:2]
    best, next_best = ends[winner], ends[second]
    error, basis = _independent_error(best, next_best), f"mean of the last {best.num_averaged} steps"
    if metric.startswith("eval/"):
        basis = "last evaluation"
        if metric == "eval/reward" and (gaps := _paired_gaps(runs[winner], runs[second])):
            error = stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
            basis = f"last evaluation, {len(gaps)} prompts compared one by one"
    return Comparison(
        metric=metric,
        winner=winner,
        second=second,
        values=(best.last, next_best.last),
        difference=sign * (best.last - next_best.last),
        error=error,
        basis=basis,
    )


def _independent_error(one: Measured, other: Measured) -> float | None:
    if one.error is None or other.error is None:
        return None
    return math.hypot(one.error, other.error)


def _paired_gaps(one: RunRecord, other: RunRecord) -> list[float]:
    """Reward of the one minus that of the other for each held-out prompt that both last evaluations scored; empty where
    the rewards were not recorded."""
    left, right = _last_rewards(one), _last_rewards(other)
    return [left[key] - right[key] for key in left if key in right]


def _last_rewards(run: RunRecord) -> dict[tuple[str, int], float]:
    """(prompt, which of its repetitions) -> reward in the last evaluation."""
    points = run.series("eval/reward")
    file = recorded_steps(run.folder / "evaluations").get(points[-1][0]) if points else None
    if file is None:
        return {}
    seen: Counter[str] = Counter()
    found = {}
    for row in read_responses(file):
        key = (row.prompt, seen[row.prompt])
        seen[row.prompt] += 1
        if row.reward is not None:
            found[key] = row.reward
    return found
