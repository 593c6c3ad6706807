"""Whole copies of parameters that ZeRO-3 partitions, before DeepSpeed has installed its own hooks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

TOGETHER_BYTES = 2**20
"""Parameters that are smaller than this together are gathered together."""


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether this rank holds only its shard."""
    return hasattr(parameter, "ds_id")


@torch.no_grad()
def whole_ones(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """The whole of each of these partitioned parameters, in new memory on its device. Collective; small ones cost one
    collective together, since each takes a millisecond between processes however little it moves."""
    shards = [vars(parameter)["ds_tensor"].detach().flatten().view(torch.uint8) for parameter in parameters]
    if len(shards) == 1 or sum(map(len, shards)) * dist.get_world_size() > TOGETHER_BYTES:
        return [_whole(parameter, shard) for parameter, shard in zip(parameters, shards, strict=True)]
    device = parameters[0].device
    own = torch.cat(shards).to(device)
    everyone = own.new_empty(dist.get_world_size() * len(own))
    dist.all_gather_into_tensor(everyone, own)
    parts = everyone.view(dist.get_world_size(), -1).split([len(shard) for shard in shards], dim=1)
    return [_shaped(parameter, part.flatten()) for parameter, part in zip(parameters, parts, strict=True)]


def _whole(parameter: nn.Parameter, shard: torch.Tensor) -> torch.Tensor:
    """Not by DeepSpeed's context manager: gloo's all-gather needs the same memory once more."""
    flat = shard.new_empty(len(shard) * dist.get_world_size(), device=parameter.device)
    if flat.is_cuda:
        dist.all_gather_into_tensor(flat, shard.to(flat.device))
    else:
        for rank, part in enumerate(flat.split(len(shard))):
            if rank == dist.get_rank():
                part.copy_(shard)
            dist.broadcast(part, src=rank)  # as bytes, which every backend supports
    return _shaped(parameter, flat)


def _shaped(parameter: nn.Parameter, flat: torch.Tensor) -> torch.Tensor:
    """Bytes of all shards, one after the other, as the parameter that they are."""
    shape: torch.Size = vars(parameter)["ds_shape"]
    return flat.view(vars(parameter)["ds_tensor"].dtype)[: shape.numel()].view(shape)
