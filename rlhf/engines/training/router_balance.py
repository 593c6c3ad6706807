"""The load-balancing loss of a mixture of experts (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6), over all
tokens that one optimizer step learns from.

With N (router, token) pairs in the step, F_i of them choosing expert i, and P_i the sum of its probabilities:

    loss = experts * sum_i (F_i / N) * (P_i / N)

as transformers defines it; it is the number of experts that a token uses where all experts are used alike. Only P has a
gradient. F must be that of the whole step, all ranks and micro-batches, or the loss would depend on how the step is
split; therefore it is counted in passes of its own before the first backward pass, unless there is one micro-batch.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from rlhf.engines.models.heads import PackedModel
from rlhf.engines.models.router_record import RouterRecord
from rlhf.engines.models.routers import num_chosen, routers_of
from rlhf.types import TrainBatch

BALANCE = "router/balance_loss"
"""The metric: the loss before its weight."""


class RouterBalance:
    """The term of one model's loss. Collective: every rank has equally many micro-batches, of the same objectives."""

    def __init__(self, packed_model: PackedModel, coef: float, *, where: str) -> None:
        """Raises ModelError, which begins with `where`, if the model has no such loss."""
        chosen = num_chosen(packed_model.model, where)
        self._coef = coef
        self._record = RouterRecord(packed_model, routers_of(packed_model.model), chosen)
        self._chosen: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def count(self, forward: Callable[[TrainBatch], object], batches: Sequence[TrainBatch]) -> None:
        """Count how often the step's tokens choose each expert, by `forward` passes over this rank's micro-batches."""
        self._chosen = {}
        if len(batches) == 1:
            return
        for batch in batches:
            forward(batch)
            before = self._chosen.get(batch.objective, torch.zeros_like(self._record.chosen))
            self._chosen[batch.objective] = before + self._record.chosen
        for objective in sorted(self._chosen):
            dist.all_reduce(self._chosen[objective])

    def loss(self, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The micro-batch's part of the loss, after its forward pass: weighted, with a gradient; and not weighted. Sums
        over micro-batches and ranks are those of the step."""
        chosen = self._chosen.get(batch.objective)
        if chosen is None:
            chosen = self._record.chosen.clone()
            dist.all_reduce(chosen)
        num_pairs = max(batch.denominators.tokens * self._record.num_routers, 1.0)
        balance = len(chosen) * (chosen / num_pairs * (self._record.probabilities / num_pairs)).sum()
        return self._coef * balance, balance.detach()
