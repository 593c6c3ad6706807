"""Weights that are not finite go nowhere: neither to the engines that sample, nor into a checkpoint or a model."""

import torch
import torch.distributed as dist

from rlhf.errors import NumericsError

SHOWN = 3


def require_finite(module: torch.nn.Module, where: str, device: torch.device) -> None:
    """Look at every parameter, each rank at what it holds; `device` is the process group's. Collective.

    No step is taken on a gradient that is not finite, so this finds what came otherwise: a model that was damaged on
    disk, memory that flipped, a kernel that wrote past its end. It reads the weights once and copies none.

    Raises:
        NumericsError: on every rank, where any holds a number that is not finite; begins with `where`.
    """
    names, parameters = zip(*module.named_parameters(), strict=True)
    # Shards that are offloaded lie in host memory.
    is_bad = torch.stack([(~_is_finite(own_part(parameter))).to(device) for parameter in parameters]).float()
    dist.all_reduce(is_bad, op=dist.ReduceOp.MAX)
    bad = [name for name, flag in zip(names, is_bad.tolist(), strict=True) if flag]
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise NumericsError(
            f"{where}: {len(bad)} of {len(names)} parameters hold numbers that are not finite: "
            f"{', '.join(bad[:SHOWN])}{more}. They were neither sent nor saved; checkpoints that are there are whole."
        )


def own_part(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this rank holds: under ZeRO-3 its shard without the padding, which nobody initializes; else everything."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter.detach()
    flat: torch.Tensor = shard.detach().flatten()
    whole = int(getattr(parameter, "ds_numel", 0))
    return flat[: max(0, whole - dist.get_rank() * flat.numel())]


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Scalar; by the extremes, which hold NaN if anything is, so that no mask as large as the weights is made."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    least, largest = tensor.aminmax()
    return least.isfinite() & largest.isfinite()
