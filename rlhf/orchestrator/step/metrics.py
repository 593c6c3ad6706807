"""The figures of a step that the loop itself knows."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rlhf.orchestrator.step.sources import GroupBatch
from rlhf.types import FinishReason, Metrics, ScoredGroup


class PhaseClock:
    """Seconds of each phase of one step: from the moment the figures of the last one were complete, so that writing
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


def flatten(metrics: Metrics) -> dict[str, float]:
    """Means and maxima under their names."""
    return {**metrics.sums, **metrics.maxima}


def describe_trained(groups: Sequence[ScoredGroup], version: int) -> dict[str, float]:
    """Figures of the sampled answers that are trained on; nothing where they came from a data set.

    `version` is the policy's. Lengths count the tokens that the model wrote.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts if rollout.weight_version >= 0]
    if not rollouts:
        return {}
    rewards = [reward.total for group in groups for reward in group.rewards]
    lengths = [
        float(len(rollout.token_ids) if rollout.loss_mask is None else rollout.loss_mask.sum()) for rollout in rollouts
    ]
    lags = [version - rollout.weight_version for rollout in rollouts]
    return {
        "reward/mean": sum(rewards) / len(rewards),
        "response/length": sum(lengths) / len(lengths),
        "response/length_max": max(lengths),
        "response/truncated": sum(r.finish_reason is FinishReason.LENGTH for r in rollouts) / len(rollouts),
        "response/empty": sum(length == 0 for length in lengths) / len(lengths),
        "rollout/weight_version": float(version),
        "rollout/lag_mean": sum(lags) / len(lags),
        "rollout/lag_max": float(max(lags)),
    }


def describe_time(clock: PhaseClock, batch: GroupBatch, num_tokens: int) -> dict[str, float]:
    """Seconds by phase, tokens (prompts and answers trained on) a second, and the share of time in generation.

    With max_lag above 0 generation runs beside training: its seconds are those of its own thread.
    """
    total = max(clock.total, 1e-9)
    times = {f"time/{name}": seconds for name, seconds in {**batch.seconds, **clock.seconds}.items()}
    figures = {**times, "time/step": total, "throughput/tokens_per_s": num_tokens / total}
    if generate := batch.seconds.get("generate"):
        figures["throughput/generation_share"] = generate / total
        figures["throughput/generated_tokens_per_s"] = batch.metrics.get("rollout/tokens", 0.0) / generate
    return figures


def merge(*parts: Mapping[str, float]) -> dict[str, float]:
    """All figures of a step, sorted by name; of two with one name the later wins."""
    merged: dict[str, float] = {}
    for part in parts:
        merged |= part
    return dict(sorted(merged.items()))
