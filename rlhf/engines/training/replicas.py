"""Checks that ranks that each hold the whole model hold the same one.

Data parallel ranks apply the same updates to their replicas and never compare them. A bit that a device or a broken
kernel changes on one of them stays, and the rollout engines and the saved model get whatever rank 0 has.
"""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist

from rlhf.engines.weight_sync.checksum import checksum
from rlhf.errors import NumericsError

CHECK_EVERY_STEPS = 100
"""Optimizer steps between checks of a model that is neither sent nor saved for so long."""
SHOWN = 3


def require_equal_replicas(module: torch.nn.Module, where: str, device: torch.device) -> None:
    """Compare a checksum of every parameter over the ranks; `device` is the process group's. Reads the weights once,
    where they are, and reduces one number for each parameter. Collective.

    Raises:
        NumericsError: on every rank, if a parameter differs; begins with `where`, names parameters and ranks.
    """
    names, parameters = zip(*module.named_parameters(), strict=True)
    sums = torch.stack([checksum(parameter) for parameter in parameters]).to(device)
    least, largest = sums.clone(), sums.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    differs = (least != largest).tolist()
    different = [name for name, flag in zip(names, differs, strict=True) if flag]
    if not different:
        return
    mine = sums[differs.index(True)].reshape(1)
    of_ranks = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, mine)
    shown = ", ".join(different[:SHOWN])
    more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
    raise NumericsError(
        f"{where}: {len(different)} of {len(names)} parameters differ between ranks: {shown}{more}; "
        f"{odd_ranks([int(value) for value in of_ranks])}. Memory or a kernel of a device is at fault: test it, or "
        "leave its node out. These weights were neither sent nor saved; continue with --resume."
    )


def odd_ranks(values: Sequence[int]) -> str:
    """Which ranks hold another value than most ranks; all of them if no value is that of most."""
    value, count = Counter(values).most_common(1)[0]
    if count * 2 <= len(values):
        return f"ranks {', '.join(map(str, range(len(values))))} disagree"
    odd = [str(rank) for rank, other in enumerate(values) if other != value]
    return f"rank {', '.join(odd)} holds others than the rest"
