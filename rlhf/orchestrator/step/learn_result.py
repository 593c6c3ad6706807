"""What was learned in a step."""

from dataclasses import dataclass, field

import numpy as np

from rlhf.types import Metrics


@dataclass(slots=True)
class LearnResult:
    """The optimizer steps of one epoch, or of all epochs over a rollout batch: their number and their metrics. Metrics
    are means over the optimizer steps, weighted by examples."""

    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    num_updates: int = 0
    num_skipped: int = 0

    def add(self, metrics: Metrics, weight: float) -> None:
        """Add the metrics of one optimizer step of `weight` examples."""
        for name, value in metrics.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * weight
            self.weights[name] = self.weights.get(name, 0.0) + weight
        for name, value in metrics.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, -np.inf), value)

    def merge(self, other: "LearnResult") -> None:
        """Add everything that `other` holds."""
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.weights[name] = self.weights.get(name, 0.0) + other.weights[name]
        for name, value in other.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, -np.inf), value)
        self.num_updates += other.num_updates
        self.num_skipped += other.num_skipped

    @property
    def metrics(self) -> Metrics:
        """Means and maxima."""
        means = {name: value / self.weights[name] for name, value in self.sums.items()}
        return Metrics(sums=means, maxima=self.maxima)
