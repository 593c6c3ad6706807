"""The weights of a module that DeepSpeed ZeRO-3 partitions over the trainer's ranks."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed as dist

from rlhf.engines.models.four_bit import four_bit_layers, full_weight
from rlhf.engines.models.split_experts import SplitTensor, under_own_names
from rlhf.engines.process.distributed import deepspeed
from rlhf.engines.weight_sync.buckets import Bucket, ParameterSpec
from rlhf.engines.weight_sync.source import Gather
from rlhf.errors import WeightSyncError


class _PartitionedParameter(Protocol):
    """The attributes that DeepSpeed ZeRO-3 adds to a parameter."""

    ds_shape: torch.Size
    ds_numel: int
    ds_tensor: torch.Tensor
    """[ceil(numel / ranks)]: this rank's shard of the flattened parameter; the last one is padded."""


class _Works:
    """Point-to-point transfers in progress; keeps the tensors that they read and write alive."""

    def __init__(self, works: list[dist.Work], tensors: list[torch.Tensor]) -> None:
        self._works = works
        self._tensors = tensors

    def wait(self, timeout_s: float) -> None:
        try:
            for work in self._works:
                work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise WeightSyncError(f"the trainer's ranks could not gather their shards: {error}") from error
        self._tensors.clear()


class Zero3Source:
    """Satisfies `WeightSource` for parameters that ZeRO-3 partitions over the default process group, and for experts
    that are spread over groups of its ranks.

    Rank 0 receives the other ranks' shards directly into the bucket: half the traffic of an all-gather on two ranks,
    and the only copy is that of rank 0's own shard. The optimizer writes the shards, so a parameter that DeepSpeed
    keeps unpartitioned (below its persistence threshold) needs no special case.
    """

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        self.dtype = dtype
        own = dict(under_own_names(module, module.named_parameters()))
        self._split = {name: tensor for name, tensor in own.items() if isinstance(tensor, SplitTensor)}
        self._named = {name: tensor for name, tensor in own.items() if isinstance(tensor, torch.nn.Parameter)}
        self._four_bit = four_bit_layers(module)
        self._shapes = {name: self._shape(name) for name in own}
        self.device = torch.device("cuda", torch.cuda.current_device()) if _is_cuda_group() else torch.device("cpu")

    def specs(self) -> list[ParameterSpec]:
        return [ParameterSpec(name, shape) for name, shape in self._shapes.items()]

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in self._split:
            return tuple(self._split[name].shape)
        if name in self._four_bit:
            return tuple(self._four_bit[name].shape)
        return tuple(cast(_PartitionedParameter, self._named[name]).ds_shape)

    @torch.no_grad()
    def gather(self, bucket: Bucket, flat: torch.Tensor | None) -> Gather:
        operations: list[dist.P2POp] = []
        tensors: list[torch.Tensor] = []
        for spec, offset in zip(bucket.parameters, bucket.offsets, strict=True):
            part = None if flat is None else flat[offset : offset + spec.numel]
            if spec.name in self._split:
                self._gather_split(spec.name, part)
                continue
            if spec.name in self._four_bit:
                self._gather_packed(spec.name, part)
                continue
            parameter = cast(_PartitionedParameter, self._named[spec.name])
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
        """A shard of a 4-bit weight cannot be dequantized by itself. So every rank gathers the quantized weight, an
        eighth of its full size, and rank 0 dequantizes it."""
        with deepspeed.zero.GatheredParameters([self._named[name]]):
            if part is not None:
                part.copy_(self._four_bit[name].dequantized().flatten())

    def _gather_split(self, name: str, part: torch.Tensor | None) -> None:
        """Experts are spread over two groups of ranks, and of two parameters one tensor is made: every rank does."""
        whole = self._split[name].whole()
        if part is not None:
            part.copy_(whole.flatten())

    @staticmethod
    def _shards(parameter: _PartitionedParameter) -> Iterator[tuple[int, int, int]]:
        """(rank, start, stop) of every shard with at least one element, without the padding."""
        size = parameter.ds_tensor.numel()
        for rank in range(dist.get_world_size()):
            start, stop = rank * size, min((rank + 1) * size, parameter.ds_numel)
            if start < stop:
                yield rank, start, stop

    @torch.no_grad()
    def materialize(self, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
        names = [spec.name for spec in bucket.parameters]
        with deepspeed.zero.GatheredParameters([self._named[name] for name in names if name in self._named]):
            # Copy everything now: gathered parameters are freed when the block ends, and the caller may continue the
            # iteration in another CUDA stream.
            tensors = [self._whole(name).to(self.device, self.dtype, copy=True) for name in names]
            if self.device.type == "cuda":
                torch.cuda.current_stream().synchronize()
        for name, tensor in zip(names, tensors, strict=True):
            if self.device.type == "cuda":
                tensor.record_stream(torch.cuda.current_stream())
            yield name, tensor

    def _whole(self, name: str) -> torch.Tensor:
        """Of a parameter that is gathered, or of experts, which this gathers."""
        if name in self._split:
            return self._split[name].whole()
        return full_weight(self._four_bit.get(name), self._named[name])


def _is_cuda_group() -> bool:
    return "nccl" in dist.get_backend()
