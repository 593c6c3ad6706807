"""Checks that weights are finite before they are sent to rollout engines, saved or exported."""

import torch
import torch.distributed as dist

from rlhf.errors import NumericsError

SHOWN = 3


def require_finite(module: torch.nn.Module, where: str, device: torch.device) -> None:
    """Check every parameter, each rank the part that it holds; `device` is the process group's. Collective.

    No step is taken on a gradient that is not finite, so this finds other causes: a model that was damaged on disk, a
    memory error, a kernel that wrote out of bounds. It reads the weights once and copies none.

    Raises:
        NumericsError: on every rank, if any rank holds a value that is not finite; begins with `where`.
    """
    names, parameters = zip(*module.named_parameters(), strict=True)
    # Offloaded shards are in host memory.
    is_bad = torch.stack([(~is_finite(local_shard(parameter))).to(device) for parameter in parameters]).float()
    dist.all_reduce(is_bad, op=dist.ReduceOp.MAX)
    bad = [name for name, flag in zip(names, is_bad.tolist(), strict=True) if flag]
    if bad:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise NumericsError(
            f"{where}: {len(bad)} of {len(names)} parameters hold values that are not finite: "
            f"{', '.join(bad[:SHOWN])}{more}. They were neither sent nor saved; earlier checkpoints are intact."
        )


def local_shard(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this rank holds: under ZeRO-3 its shard, without the padding, which is uninitialized; else everything."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter.detach()
    flat: torch.Tensor = shard.detach().flatten()
    whole = int(getattr(parameter, "ds_numel", 0))
    # Experts are partitioned over some of the ranks only.
    rank = dist.get_rank(getattr(parameter, "ds_process_group", None))
    return flat[: max(0, whole - rank * flat.numel())]


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """A boolean scalar. Checks minimum and maximum, which are NaN if any value is: no mask as large as the weights is
    allocated."""
    if not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    if tensor.element_size() < 2:
        tensor = tensor.to(torch.bfloat16)  # torch has no minimum of float8
    least, largest = tensor.aminmax()
    return least.isfinite() & largest.isfinite()
