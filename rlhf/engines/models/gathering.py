"""Whole copies of parameters that ZeRO-3 partitions, before DeepSpeed has installed its own hooks."""

import torch
import torch.distributed as dist
from torch import nn


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether this rank holds only its shard."""
    return hasattr(parameter, "ds_id")


@torch.no_grad()
def whole(parameter: nn.Parameter) -> torch.Tensor:
    """The whole of a partitioned parameter, in new memory on its device. Collective.

    Not by DeepSpeed's context manager: gloo's all-gather needs the same memory once more.
    """
    shard: torch.Tensor = vars(parameter)["ds_tensor"].detach().flatten()
    shape: torch.Size = vars(parameter)["ds_shape"]
    size = shard.numel()
    flat = torch.empty(size * dist.get_world_size(), dtype=shard.dtype, device=parameter.device)
    if flat.is_cuda:
        dist.all_gather_into_tensor(flat, shard.to(flat.device))
    else:
        for rank, part in enumerate(flat.split(size)):
            if rank == dist.get_rank():
                part.copy_(shard)
            dist.broadcast(part.view(torch.uint8), src=rank)  # as bytes, which every backend supports
    return flat[: shape.numel()].view(shape)
