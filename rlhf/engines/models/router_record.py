"""What the routers of a mixture of experts did in a forward pass: which experts they chose for the tokens that are
learned from, and with which probabilities."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from rlhf.engines.models.heads import PackedModel
from rlhf.engines.models.packed import PackedInput
from rlhf.engines.models.routers import Router


class RouterRecord:
    """Observes each forward pass of a `PackedModel`, in which every router gives logits [tokens, experts]. Not the
    passes that gradient checkpointing repeats."""

    def __init__(self, packed_model: PackedModel, routers: Sequence[Router], num_chosen: int) -> None:
        self._num_chosen = num_chosen
        self._logits: list[list[torch.Tensor]] = [[] for _ in routers]
        self._is_open = False
        self.num_routers = len(routers)
        self.chosen = torch.zeros(0)
        """[experts]: how often each expert was chosen in the last pass, over all routers and tokens learned from."""
        self.probabilities = torch.zeros(0)
        """[experts]: the sum of each expert's probability over the same; differentiable."""
        packed_model.register_forward_pre_hook(self._open)
        packed_model.register_forward_hook(self._close)
        for index, router in enumerate(routers):
            router.module.register_forward_hook(partial(self._observe, index, router.place))

    def _open(self, *_: object) -> None:
        for logits in self._logits:
            logits.clear()
        self._is_open = True

    def _observe(self, index: int, place: int, module: nn.Module, inputs: object, outputs: object) -> None:
        if self._is_open:
            logits: torch.Tensor = outputs[place] if isinstance(outputs, tuple) else outputs  # type: ignore[assignment]
            self._logits[index].append(logits.reshape(-1, logits.shape[-1]))

    def _close(self, packed_model: PackedModel, inputs: tuple[PackedInput], output: torch.Tensor) -> None:
        (packed,) = inputs
        self._is_open = False
        is_learned = torch.zeros(len(packed.token_ids), dtype=torch.bool, device=packed.token_ids.device)
        is_learned[packed.wanted] = True
        rows = is_learned[packed_model.passes.order(packed.lengths).to(is_learned.device)]
        sums = [self._sums(torch.cat(logits)[: len(rows)], rows) for logits in self._logits]
        self.chosen = torch.stack([chosen for chosen, _ in sums]).sum(0)
        self.probabilities = torch.stack([probabilities for _, probabilities in sums]).sum(0)
        for logits in self._logits:
            logits.clear()

    def _sums(self, logits: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one router's logits [tokens, experts], over the tokens of `rows`."""
        probabilities = logits[rows].float().softmax(-1)
        experts = probabilities.topk(self._num_chosen, dim=-1).indices
        return experts.flatten().bincount(minlength=logits.shape[-1]).float(), probabilities.sum(0)
