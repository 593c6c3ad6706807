"""The bare collectives of a weight sync, to compare its time with: all-gather of the shards, and broadcast."""

import time
from collections.abc import Callable
from math import ceil

import torch
import torch.distributed as dist


def time_collectives(
    num_bytes: int, num_buckets: int, num_trainers: int, repeats: int, device: torch.device
) -> list[tuple[float, float]]:
    """Move `num_bytes` in `num_buckets` buckets, once to warm up and then `repeats` times. Buffers are allocated
    before; nothing is computed, checked or loaded. Collective over the default group, whose first ranks are the
    trainer's, followed by one process for each rollout engine.

    Returns, for each repeat, the seconds of the all-gathers over the trainer's ranks, and of the broadcasts from the
    first of them to the engines. If the group has no engine process (engines are colocated with the trainer), the
    gathered buffer is copied on the device instead.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    trainers = dist.new_group(list(range(num_trainers)))
    ends = [0, *range(num_trainers, world)]
    senders = dist.new_group(ends)
    shard = torch.ones(ceil(num_bytes / num_buckets / num_trainers), dtype=torch.uint8, device=device)
    full = torch.ones(len(shard) * num_trainers, dtype=torch.uint8, device=device)
    copy = torch.empty_like(full)

    def gather() -> None:
        if rank < num_trainers:
            dist.all_gather_into_tensor(full, shard, group=trainers)

    def send() -> None:
        if world == num_trainers:
            copy.copy_(full)
        elif rank in ends:
            dist.broadcast(full, 0, group=senders)

    def seconds(work: Callable[[], None]) -> float:
        dist.barrier()
        start = time.perf_counter()
        for _ in range(num_buckets):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter() - start

    return [(seconds(gather), seconds(send)) for _ in range(repeats + 1)][1:]
