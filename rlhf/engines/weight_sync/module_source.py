"""The weights of a module that every rank holds whole: plain, or ZeRO stages 0 to 2."""

from collections.abc import Iterator

import torch

from rlhf.engines.models.four_bit import four_bit_layers, full_weight
from rlhf.engines.weight_sync.buckets import Bucket, ParameterSpec
from rlhf.engines.weight_sync.source import Done, Gather


class ModuleSource:
    """Satisfies `WeightSource`. Every rank holds full parameters, so only rank 0's are read."""

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._parameters = dict(module.named_parameters())
        self._four_bit = four_bit_layers(module)
        self.device = next(iter(self._parameters.values())).device

    def specs(self) -> list[ParameterSpec]:
        return [
            ParameterSpec(name, self._four_bit[name].shape if name in self._four_bit else tuple(p.shape))
            for name, p in self._parameters.items()
        ]

    @torch.no_grad()
    def gather(self, bucket: Bucket, flat: torch.Tensor | None) -> Gather:
        if flat is not None:
            for name, view in bucket.views(flat):
                view.copy_(self._whole(name))
        return Done()

    @torch.no_grad()
    def materialize(self, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
        for spec in bucket.parameters:
            yield spec.name, self._whole(spec.name).to(self.dtype)

    def _whole(self, name: str) -> torch.Tensor:
        return full_weight(self._four_bit.get(name), self._parameters[name])
