"""Where the weights come from: a Hugging Face module, whole on every rank or sharded by ZeRO-3.

A source hands out one bucket at a time, in the wire's dtype; the whole model is never materialized. Tied weights are
given once, under the name that `named_parameters` gives them.
"""

from collections.abc import Iterator
from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed as dist

from rlhf.engines.models.four_bit import four_bit_layers, whole_weight
from rlhf.engines.weight_sync.buckets import Bucket, ParameterSpec, dtype_of
from rlhf.errors import WeightSyncError


class Gather(Protocol):
    """A bucket on its way to rank 0."""

    def wait(self, timeout_s: float) -> None:
        """Block until rank 0 has it all (other ranks: until theirs is sent). Raises WeightSyncError on time-out."""
        ...


class WeightSource(Protocol):
    """Gives a model's weights bucket by bucket. Every rank of the trainer goes through the same buckets in order."""

    dtype: torch.dtype
    """What the weights are cast to: the dtype that the rollout engines compute in."""
    device: torch.device
    """Where `gather` wants the bucket, and `materialize` puts it."""

    def specs(self) -> list[ParameterSpec]:
        """Name and full shape of every parameter, without communication."""
        ...

    def gather(self, bucket: Bucket, flat: torch.Tensor | None) -> Gather:
        """Start to fill `flat` [bucket.numel] on rank 0; the other ranks pass None and give what they hold."""
        ...

    def materialize(self, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
        """Give the bucket's full tensors on every rank."""
        ...


def make_source(module: torch.nn.Module, dtype: str) -> WeightSource:
    """The source that fits how `module`'s parameters are held; `dtype` (float32, bfloat16) is what engines compute in.

    Names are those of `module.named_parameters()`: pass the Hugging Face model itself, not DeepSpeed's wrapper.
    Adapters are merged into the matrices that they stand beside.
    """
    from rlhf.engines.models.adapters import adapters_of  # noqa: PLC0415  - DeepSpeed takes seconds
    from rlhf.engines.process.distributed import deepspeed  # noqa: PLC0415
    from rlhf.engines.weight_sync.merged import MergedSource  # noqa: PLC0415

    is_partitioned = deepspeed.runtime.zero.partition_parameters.is_zero_param
    kind = Zero3Source if any(is_partitioned(parameter) for parameter in module.parameters()) else ModuleSource
    source: WeightSource = kind(module, dtype_of(dtype))
    adapters = adapters_of(module)
    return MergedSource(source, adapters) if adapters else source


class Done:
    """A gather without communication."""

    def wait(self, timeout_s: float) -> None:
        del timeout_s


class ModuleSource:
    """A module whose parameters are whole on every rank: plain, or ZeRO 0 to 2. Only rank 0's are read."""

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._parameters = dict(module.named_parameters())
        self._packed = four_bit_layers(module)
        self.device = next(iter(self._parameters.values())).device

    def specs(self) -> list[ParameterSpec]:
        return [
            ParameterSpec(name, self._packed[name].shape if name in self._packed else tuple(p.shape))
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
        return whole_weight(self._packed.get(name), self._parameters[name])


class _PartitionedParameter(Protocol):
    """What DeepSpeed's ZeRO-3 adds to a parameter."""

    ds_shape: torch.Size
    ds_numel: int
    ds_tensor: torch.Tensor
    """[ceil(numel / ranks)]: this rank's part of the flattened parameter; the last one is padded."""


class _Works:
    """Point-to-point transfers under way; keeps what they read and write alive."""

    def __init__(self, works: list[dist.Work], tensors: list[torch.Tensor]) -> None:
        self._works = works
        self._tensors = tensors

    def wait(self, timeout_s: float) -> None:
        try:
            for work in self._works:
                work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise WeightSyncError(f"the trainer's ranks did not bring their shards together: {error}") from error
        self._tensors.clear()


class Zero3Source:
    """A module whose parameters are sharded by DeepSpeed ZeRO-3 over the default process group.

    Rank 0 receives the others' shards straight into their places: half the traffic of an all-gather on two ranks,
    and no copy but rank 0's own shard. The shards are what the optimizer wrote, so a parameter that DeepSpeed keeps
    whole (below its persistence threshold) needs no special case.
    """

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._named = dict(module.named_parameters())
        self._packed = four_bit_layers(module)
        self._parameters = {name: cast(_PartitionedParameter, p) for name, p in self._named.items()}
        self.device = torch.device("cuda", torch.cuda.current_device()) if _is_cuda_group() else torch.device("cpu")

    def specs(self) -> list[ParameterSpec]:
        return [
            ParameterSpec(name, self._packed[name].shape if name in self._packed else tuple(p.ds_shape))
            for name, p in self._parameters.items()
        ]

    @torch.no_grad()
    def gather(self, bucket: Bucket, flat: torch.Tensor | None) -> Gather:
        operations: list[dist.P2POp] = []
        tensors: list[torch.Tensor] = []
        for spec, offset in zip(bucket.parameters, bucket.offsets, strict=True):
            if spec.name in self._packed:
                self._gather_packed(spec.name, None if flat is None else flat[offset : offset + spec.numel])
                continue
            parameter = self._parameters[spec.name]
            for rank, start, stop in self._shards(parameter):
                if rank == 0 and flat is not None:
                    flat[offset + start : offset + stop].copy_(parameter.ds_tensor[: stop - start])
                elif flat is not None:
                    tensors.append(flat[offset + start : offset + stop])
                    operations.append(dist.P2POp(dist.irecv, tensors[-1], rank))
                elif rank == dist.get_rank():
                    tensors.append(parameter.ds_tensor[: stop - start].to(self.device, self.dtype))
                    operations.append(dist.P2POp(dist.isend, tensors[-1], 0))
        return _Works(dist.batch_isend_irecv(operations) if operations else [], tensors)

    def _gather_packed(self, name: str, part: torch.Tensor | None) -> None:
        """A shard of what is packed is nothing by itself: the whole comes to every rank, an eighth of the weights, and
        rank 0 unpacks it."""
        from rlhf.engines.process.distributed import deepspeed  # noqa: PLC0415  - takes seconds

        with deepspeed.zero.GatheredParameters([self._named[name]]):
            if part is not None:
                part.copy_(self._packed[name].unpacked().flatten())

    @staticmethod
    def _shards(parameter: _PartitionedParameter) -> Iterator[tuple[int, int, int]]:
        """(rank, start, stop) of every shard that holds at least one element; the padding is left out."""
        size = parameter.ds_tensor.numel()
        for rank in range(dist.get_world_size()):
            start, stop = rank * size, min((rank + 1) * size, parameter.ds_numel)
            if start < stop:
                yield rank, start, stop

    @torch.no_grad()
    def materialize(self, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
        from rlhf.engines.process.distributed import deepspeed  # noqa: PLC0415  - takes seconds

        names = [spec.name for spec in bucket.parameters]
        with deepspeed.zero.GatheredParameters([self._named[name] for name in names]):
            # Copies, and all of them now: what was gathered is freed on leaving, and an iteration may go on in another
            # CUDA stream than it began in.
            whole = [whole_weight(self._packed.get(name), self._named[name]) for name in names]
            tensors = [tensor.to(self.device, self.dtype, copy=True) for tensor in whole]
            if self.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        for name, tensor in zip(names, tensors, strict=True):
            if self.device.type == "cuda":
                tensor.record_stream(torch.cuda.current_stream())
            yield name, tensor


def _is_cuda_group() -> bool:
    return "nccl" in dist.get_backend()
