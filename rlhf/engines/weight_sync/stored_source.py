"""The weights of a model under the names and in the shapes that its checkpoint has, which a vLLM model's loader knows.

Transformers renames, splits and joins tensors while it loads: the experts of a layer, one tensor each on disk, are one
tensor in memory. Here its reverse conversion is applied to each bucket.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rlhf.engines.weight_sync.buckets import Bucket, ParameterSpec
from rlhf.engines.weight_sync.conversion import Convert, conversion_groups
from rlhf.engines.weight_sync.source import Gather, WeightSource
from rlhf.errors import WeightSyncError


@dataclass(frozen=True, slots=True)
class _Group:
    """Tensors that are converted together: in memory, and as they are stored. Both have the same number of elements."""

    held: tuple[ParameterSpec, ...]
    stored: tuple[ParameterSpec, ...]


class StoredSource:
    """Satisfies `WeightSource`: another source's weights under stored names. What is converted together must come in
    one bucket; it is part of one layer, and buckets hold whole layers."""

    def __init__(self, source: WeightSource, model: PreTrainedModel) -> None:
        self.dtype = source.dtype
        self.device = source.device
        self._source = source
        self._convert: Convert = lambda tensors: revert_weight_conversion(model, dict(tensors))
        specs = {spec.name: spec for spec in source.specs()}
        meta = {name: torch.empty(spec.shape, dtype=self.dtype, device="meta") for name, spec in specs.items()}
        self._groups = [
            _Group(
                held=tuple(specs[name] for name in group.held),
                stored=tuple(ParameterSpec(name, tuple(tensor.shape)) for name, tensor in group.stored.items()),
            )
            for group in conversion_groups(meta, self._convert)
        ]
        self._by_stored = {spec.name: group for group in self._groups for spec in group.stored}

    def specs(self) -> list[ParameterSpec]:
        return [spec for group in self._groups for spec in group.stored]

    def gather(self, bucket: Bucket, flat: torch.Tensor | None) -> Gather:
        groups = self._groups_in(bucket)
        return _Converting(self._source.gather(_held(groups), flat), groups, flat, self._convert)

    @torch.no_grad()
    def materialize(self, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
        groups = self._groups_in(bucket)
        tensors = self._source.materialize(_held(groups))
        for group in groups:
            held = dict(next(tensors) for _ in group.held)
            stored = self._convert(held)
            for spec in group.stored:
                yield spec.name, stored[spec.name].contiguous()

    def _groups_in(self, bucket: Bucket) -> list[_Group]:
        """The groups of a bucket, in its order. Raises WeightSyncError if it holds a part of one."""
        groups = list(dict.fromkeys(self._by_stored[spec.name] for spec in bucket.parameters))
        if tuple(spec for group in groups for spec in group.stored) != bucket.parameters:
            raise WeightSyncError(
                f"the bucket of {bucket.parameters[0].name} splits tensors that are converted together"
            )
        return groups


class _Converting:
    """A bucket on its way to rank 0, which converts it when it has arrived."""

    def __init__(self, gather: Gather, groups: Sequence[_Group], flat: torch.Tensor | None, convert: Convert) -> None:
        self._gather = gather
        self._groups = groups
        self._flat = flat
        self._convert = convert

    @torch.no_grad()
    def wait(self, timeout_s: float) -> None:
        self._gather.wait(timeout_s)
        if self._flat is None:
            return
        start = 0
        for group in self._groups:
            held, stored = Bucket.of(group.held), Bucket.of(group.stored)
            part = self._flat[start : start + held.numel]
            start += held.numel
            found = self._convert(dict(held.views(part)))
            moved = [
                (view, found[name].clone())
                for name, view in stored.views(part)
                if found[name].data_ptr() != view.data_ptr() or not found[name].is_contiguous()
            ]
            for view, tensor in moved:
                view.copy_(tensor)


def _held(groups: Sequence[_Group]) -> Bucket:
    return Bucket.of([spec for group in groups for spec in group.held])
