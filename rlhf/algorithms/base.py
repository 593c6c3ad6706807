"""What an algorithm is: which models it needs, how it turns scored groups into experiences, and its losses."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from rlhf.algorithms.needs import EmaReference, Needs
from rlhf.algorithms.sequences import one_by_one
from rlhf.types import (
    Denominators,
    Example,
    Experience,
    Json,
    Metrics,
    ScoredGroup,
    Signal,
    Signals,
    TrainBatch,
)

__all__ = ["Algorithm", "EmaReference", "LossOutput", "Needs", "Objective", "Outputs", "TensorBatch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorBatch:
    """A `TrainBatch` on its device: same names, same shapes."""

    lengths: torch.Tensor
    loss_mask: torch.Tensor
    example_index: torch.Tensor
    targets: torch.Tensor
    margins: torch.Tensor
    denominators: Denominators
    signals: Mapping[Signal, torch.Tensor] = field(default_factory=dict)
    coefficients: Mapping[str, float] = field(default_factory=dict)
    is_first_pass: bool = False

    @classmethod
    def from_numpy(cls, batch: TrainBatch, device: torch.device) -> "TensorBatch":
        """Copy a packed micro-batch to `device`."""
        return cls(
            lengths=torch.tensor(batch.tokens.lengths, device=device),
            loss_mask=torch.tensor(batch.loss_mask, device=device),
            example_index=torch.tensor(batch.example_index, device=device),
            targets=torch.tensor(batch.targets, device=device),
            margins=torch.tensor(batch.margins, device=device),
            denominators=batch.denominators,
            signals={signal: torch.tensor(array, device=device) for signal, array in batch.signals.items()},
            coefficients=batch.coefficients,
            is_first_pass=batch.is_first_pass,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What a model returned for a micro-batch: `predictions` is [T] log-probs or values, or [S] scores, by its head;
    `entropy` [T] comes with log-probs, float32. Both are 0 at the first token of a sequence and wherever `loss_mask` is
    False: the output layer leaves those tokens out."""

    predictions: torch.Tensor
    entropy: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """A scalar loss, already divided by global denominators: adding it over all micro-batches and ranks of the step
    gives the loss of the step. Metrics follow the same rule."""

    loss: torch.Tensor
    metrics: Metrics = field(default_factory=Metrics)


Objective: TypeAlias = Callable[[Outputs, TensorBatch], LossOutput]


class Algorithm(ABC):
    """An algorithm: which models it needs, how scored groups become experiences, and its losses.

    `keep`, `select`, `credit`, `after_pass` and `describe` run on the driver; `objectives` on the workers, which
    rebuild the algorithm from its config (nothing is pickled). State between steps (a KL controller, running reward
    statistics) is JSON, so that a checkpoint can hold it. A worker never sees that state: what a loss needs of it
    travels as an experience's `coefficients`.
    """

    needs: Needs

    def keep(self, group: ScoredGroup) -> bool:
        """Whether a group is worth training on. Online, groups that are not are replaced by others (dynamic
        sampling); offline, they are left out."""
        return True

    def select(self, groups: Sequence[ScoredGroup]) -> list[Example]:
        """Choose what to learn from, in the groups' order. Here: one example per response."""
        return one_by_one(groups)

    @abstractmethod
    def credit(self, examples: Sequence[Example], signals: Sequence[Signals]) -> tuple[list[Experience], Metrics]:
        """Give each example its advantages, pairs or labels: exactly one experience per example, in order. `signals`
        may lack the old log-probs if `needs.late_old_log_probs`."""

    @abstractmethod
    def objectives(self) -> Mapping[str, Objective]:
        """The losses by name. A trained role's loss has the role's name; others (ptx) are named by their batches."""

    def after_pass(self, metrics: Metrics) -> bool:
        """Whether another pass over the same batch may follow (PPO's early stop by KL). `metrics` are those of the
        losses, averaged over the optimizer steps of the pass that just ended."""
        return True

    def describe(self, examples: Sequence[Example], signals: Sequence[Signals]) -> Metrics:
        """Metrics of the step, once it was learned from; `signals` are complete. What the next step follows from (a KL
        controller) moves here."""
        del examples, signals
        return Metrics()

    def state(self) -> dict[str, Json]:
        """What must survive a restart."""
        return {}

    def restore(self, state: Mapping[str, Json]) -> None:
        """Continue from what `state` returned."""
        del state
