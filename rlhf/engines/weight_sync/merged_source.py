"""A model with adapters as a source of weights: each matrix with its adapter merged, bucket by bucket.

Neither the model nor a second copy of it is changed: a matrix is merged where it is about to be sent from.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from rlhf.engines.models.adapter_names import plain_name
from rlhf.engines.models.adapters import Adapter, Parts
from rlhf.engines.weight_sync.buckets import Bucket, ParameterSpec
from rlhf.engines.weight_sync.source import Gather, WeightSource


class MergedSource:
    """Another source's weights under their plain names, with what the adapters add to them."""

    def __init__(self, source: WeightSource, adapters: Mapping[str, Adapter]) -> None:
        """`adapters` by the plain name of the matrix that they stand beside."""
        self.dtype = source.dtype
        self.device = source.device
        self._source = source
        self._adapters = adapters
        named = [(plain_name(spec.name), spec) for spec in source.specs()]
        self._inner = {name: spec for name, spec in named if name is not None}

    def specs(self) -> list[ParameterSpec]:
        return [replace(spec, name=name) for name, spec in self._inner.items()]

    def gather(self, bucket: Bucket, flat: torch.Tensor | None) -> Gather:
        # The small matrices are whole on every rank before the large ones are on their way: all ranks ask in one order.
        parts = self._parts(bucket)
        return _Merging(self._source.gather(self._under_inner_names(bucket), flat), bucket, flat, parts)

    @torch.no_grad()
    def materialize(self, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
        tensors = self._source.materialize(self._under_inner_names(bucket))
        for spec, (_, tensor) in zip(bucket.parameters, tensors, strict=True):
            # Gathered where it is used: who asks may use another stream of the device for each tensor.
            adapter = self._adapters.get(spec.name)
            yield spec.name, tensor if adapter is None else adapter.parts().added_to(tensor)

    def _parts(self, bucket: Bucket) -> dict[str, Parts]:
        named = [spec.name for spec in bucket.parameters if spec.name in self._adapters]
        return {name: self._adapters[name].parts() for name in named}

    def _under_inner_names(self, bucket: Bucket) -> Bucket:
        return replace(bucket, parameters=tuple(self._inner[spec.name] for spec in bucket.parameters))


class _Merging:
    """A bucket on its way to rank 0, which merges it once it is there."""

    def __init__(self, gather: Gather, bucket: Bucket, flat: torch.Tensor | None, parts: Mapping[str, Parts]) -> None:
        self._gather = gather
        self._bucket = bucket
        self._flat = flat
        self._parts = parts

    @torch.no_grad()
    def wait(self, timeout_s: float) -> None:
        self._gather.wait(timeout_s)
        if self._flat is None:
            return
        for name, view in self._bucket.views(self._flat):
            if name in self._parts:
                view.copy_(self._parts[name].added_to(view))
