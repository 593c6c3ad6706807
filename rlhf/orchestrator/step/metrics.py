"""The metrics of a step that the loop itself knows, and how those of all producers become one line."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rlhf.orchestrator.step.sources import GroupBatch
from rlhf.types import Example, Metrics, ScoredGroup


class PhaseClock:
    """Seconds of each phase of one step. It starts when the metrics of the step before are complete, so that writing
    them and saving a checkpoint count in the step after."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of this block as `name`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] += time.monotonic() - start

    @property
    def total(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self._start


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuBudget:
    """The GPUs of a run, and what training costs on them."""

    num_gpus: int
    """All GPUs of the run, those of rollout engines included."""
    peak_flops: float | None = None
    """Floating-point operations a second that one GPU can do at most; None where its kind is unknown."""
    training_flops: Callable[[float], float] | None = None
    """Tokens of context -> floating-point operations of learning from one token with that context, in all epochs;
    None where a model's size is unknown."""


def merge(parts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """One mapping of all metrics, sorted by name, from {producer: its metrics}.

    Raises:
        ValueError: two producers have a metric of the same name.
    """
    producer_of: dict[str, str] = {}
    merged: dict[str, float] = {}
    for producer, metrics in parts.items():
        for name, value in metrics.items():
            if name in producer_of:
                raise ValueError(
                    f"metric {name}: produced by {producer_of[name]} and by {producer}. A metric has one producer; "
                    "rename one of the two"
                )
            producer_of[name] = producer
            merged[name] = value
    return dict(sorted(merged.items()))


def flatten(metrics: Metrics) -> dict[str, float]:
    """Means and maxima under their names."""
    return merge({"means": metrics.sums, "maxima": metrics.maxima})


def lag_metrics(groups: Sequence[ScoredGroup], version: int, max_lag: int) -> dict[str, float]:
    """How old the weights were that sampled the groups, with the share of the responses of each age. `version` is that
    of the policy, before it learns from them."""
    rollouts = [rollout for group in groups for rollout in group.rollouts if rollout.is_sampled]
    lags = [version - rollout.weight_version for rollout in rollouts]
    ages = range(max_lag + 1)
    return {f"rollout/lag/{age}": lags.count(age) / max(len(lags), 1) for age in ages} | {
        "rollout/weight_version": float(version),
        "rollout/lag_mean": sum(lags) / max(len(lags), 1),
        "rollout/lag_max": float(max(lags, default=0)),
    }


def row_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """What the step's rows have."""
    return {"data/labeled": sum(group.prompt.label is not None for group in groups) / len(groups)}


def time_metrics(clock: PhaseClock, batch: GroupBatch) -> dict[str, float]:
    """Seconds of the step and of its phases.

    With max_lag above 0 generation runs beside training: its seconds are those of its own thread.
    """
    phases = {f"time/{name}": seconds for name, seconds in {**batch.seconds, **clock.seconds}.items()}
    return {**phases, "time/step": clock.total}


def throughput_metrics(
    step_s: float, batch: GroupBatch, examples: Sequence[Example], gpus: GpuBudget | None
) -> dict[str, float]:
    """Tokens a second and utilization, of a step that took `step_s` seconds. Tokens are those of prompts and responses
    that are trained on."""
    step_s = max(step_s, 1e-9)
    lengths = [len(sequence) for example in examples for sequence in example.sequences]
    tokens_per_s = sum(lengths) / step_s
    metrics = {"throughput/tokens_per_s": tokens_per_s}
    if generate_s := batch.seconds.get("generate"):
        metrics["throughput/generation_share"] = generate_s / step_s
        metrics["throughput/generated_tokens_per_s"] = batch.metrics.get("rollout/tokens", 0.0) / generate_s
    if gpus is not None:
        metrics["throughput/tokens_per_s_per_gpu"] = tokens_per_s / gpus.num_gpus
        if gpus.peak_flops is not None and gpus.training_flops is not None:
            # Token t of a sequence sees t tokens: on average half of the sequence's length.
            flops = sum(length * gpus.training_flops(length / 2) for length in lengths)
            metrics["throughput/mfu"] = flops / step_s / (gpus.num_gpus * gpus.peak_flops)
    return metrics
