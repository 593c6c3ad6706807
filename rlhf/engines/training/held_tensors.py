"""The tensors of a trained model, however its ranks hold them: whole or partitioned, in 4 bits, with adapters, experts
spread over ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from rlhf.engines.models.adapter_names import plain_name
from rlhf.engines.models.adapters import Adapter, adapters_of
from rlhf.engines.models.four_bit import FourBitLinear, four_bit_layers, full_weight
from rlhf.engines.models.split_experts import SplitTensor, under_own_names
from rlhf.engines.process.distributed import deepspeed


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldTensor:
    """A parameter or a persistent buffer."""

    tensor: torch.Tensor | SplitTensor
    four_bit: FourBitLinear | None = None
    adapter: Adapter | None = None

    @property
    def layout(self) -> torch.Tensor:
        """An empty tensor on the meta device with the dtype and shape that `whole` gives."""
        if self.four_bit is not None:
            return torch.empty(self.four_bit.shape, dtype=self.four_bit.dtype, device="meta")
        shape: torch.Size = getattr(self.tensor, "ds_shape", self.tensor.shape)
        return torch.empty(shape, dtype=self.tensor.dtype, device="meta")

    @contextmanager
    def whole(self) -> Iterator[torch.Tensor]:
        """The full tensor on every rank, with its adapter merged, until the block ends. Collective under ZeRO-3."""
        if isinstance(self.tensor, SplitTensor):
            yield self.tensor.whole()
            return
        with torch.no_grad():
            gathered = None if self.adapter is None else self.adapter.gathered()
            with deepspeed.zero.GatheredParameters([self.tensor]):
                full = full_weight(self.four_bit, self.tensor)
                yield full if gathered is None else gathered.merged_into(full)


def held_tensors(model: PreTrainedModel) -> dict[str, HeldTensor]:
    """Every parameter and persistent buffer by its name in the model without adapters, tied ones once."""
    adapters, four_bit, persistent = adapters_of(model), four_bit_layers(model), model.state_dict().keys()
    found = {}
    stored = [one for one in [*model.named_parameters(), *model.named_buffers()] if one[0] in persistent]
    for inner_name, tensor in under_own_names(model, stored):
        name = plain_name(inner_name)
        if name is not None:
            found[name] = HeldTensor(tensor=tensor, four_bit=four_bit.get(inner_name), adapter=adapters.get(name))
    return found
