"""The weights of a model with LoRA adapters: each matrix with its adapter merged, bucket by bucket.

The model itself is not changed, and not copied: an adapter is merged into the buffer that is sent.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from rlhf.engines.models.adapter_names import plain_name
from rlhf.engines.models.adapters import Adapter, LoraMatrices
from rlhf.engines.weight_sync.buckets import Bucket, ParameterSpec
from rlhf.engines.weight_sync.source import Gather, WeightSource


class MergedSource:
    """Satisfies `WeightSource`: another source's weights under the base model's names, with adapters merged in."""

    def __init__(self, source: WeightSource, adapters: Mapping[str, Adapter]) -> None:
        """`adapters` by the base model's name of the matrix that they adapt."""
        self.dtype = source.dtype
        self.device = source.device
        self._source = source
        self._adapters = adapters
        named = [(plain_name(spec.name), spec) for spec in source.specs()]
        self._inner = {name: spec for name, spec in named if name is not None}

    def specs(self) -> list[ParameterSpec]:
        return [replace(spec, name=name) for name, spec in self._inner.items()]

    def gather(self, bucket: Bucket, flat: torch.Tensor | None) -> Gather:
        # Gather the small matrices before the large ones start: all ranks must run collectives in the same order.
        gathered = self._gathered(bucket)
        return _Merging(self._source.gather(self._under_inner_names(bucket), flat), bucket, flat, gathered)

    @torch.no_grad()
    def materialize(self, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
        tensors = self._source.materialize(self._under_inner_names(bucket))
        for spec, (_, tensor) in zip(bucket.parameters, tensors, strict=True):
            # Gathered right before use: the caller may use another CUDA stream for each tensor.
            adapter = self._adapters.get(spec.name)
            yield spec.name, tensor if adapter is None else adapter.gathered().merged_into(tensor)

    def _gathered(self, bucket: Bucket) -> dict[str, LoraMatrices]:
        named = [spec.name for spec in bucket.parameters if spec.name in self._adapters]
        return {name: self._adapters[name].gathered() for name in named}

    def _under_inner_names(self, bucket: Bucket) -> Bucket:
        return replace(bucket, parameters=tuple(self._inner[spec.name] for spec in bucket.parameters))


class _Merging:
    """A bucket on its way to rank 0, which merges the adapters when it has arrived."""

    def __init__(
        self, gather: Gather, bucket: Bucket, flat: torch.Tensor | None, gathered: Mapping[str, LoraMatrices]
    ) -> None:
        self._gather = gather
        self._bucket = bucket
        self._flat = flat
        self._gathered = gathered

    @torch.no_grad()
    def wait(self, timeout_s: float) -> None:
        self._gather.wait(timeout_s)
        if self._flat is None:
            return
        for name, view in self._bucket.views(self._flat):
            if name in self._gathered:
                view.copy_(self._gathered[name].merged_into(view))
