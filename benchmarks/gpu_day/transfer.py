"""What moves weights, without Ray and vLLM: checksums, memory that two processes share, collectives."""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.gpu_day.ranks import TIMEOUT_S, run_ranks
from benchmarks.gpu_day.setting import Figures, Setting
from rlhf.engines.process.rendezvous import open_store
from rlhf.engines.weight_sync.checksum import checksum

REPEATS = 5


def _best_seconds(run: Callable[[], object]) -> float:
    """The shortest of several repetitions, without the first."""
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _tensor(setting: Setting, num_bytes: int) -> torch.Tensor:
    """Random bfloat16 numbers on the device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_bytes // 2, generator=generator).to(torch.bfloat16).to(setting.device)


def _rate(num_bytes: int, seconds: float) -> str:
    return f"{num_bytes / seconds / 1e9:.1f} GB/s"


def checksums(setting: Setting) -> Figures:
    """The digest of a weight on the device is that of its copy on the host, and one changed bit changes it."""
    size = 2**20 if setting.is_dry else 2**30
    weight = _tensor(setting, size)
    ours, theirs = int(checksum(weight)), int(checksum(weight.cpu()))
    if ours != theirs:
        raise AssertionError(f"{ours} on the device, {theirs} on the host")
    weight.view(torch.int16)[size // 4] ^= 1
    if int(checksum(weight)) == ours:
        raise AssertionError("a changed bit is not seen")
    return [("device = host", "the same"), ("speed", _rate(size, _best_seconds(lambda: int(checksum(weight)))))]


def shared_memory(setting: Setting) -> Figures:
    """Another process reads a buffer on the same device (CUDA IPC), sees it change, and digests the same bits."""
    size = 2**20 if setting.is_dry else 2**28
    buffer = _tensor(setting, size)
    if setting.is_dry:
        buffer.share_memory_()
    context = mp.get_context("spawn")
    requests, replies = context.Queue(), context.Queue()
    reader = context.Process(target=_read, args=(requests, replies), daemon=True)
    reader.start()
    try:
        for round_number in range(2):
            buffer.mul_(2.0)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            requests.put(buffer)
            received, seconds = replies.get(timeout=TIMEOUT_S)
            if received != int(checksum(buffer)):
                raise AssertionError(f"round {round_number}: the other process reads other numbers")
    finally:
        requests.put(None)
        reader.join(TIMEOUT_S)
    return [("read by another process", "the same bits, twice"), ("copy in the reader", _rate(size, seconds))]


def _read(requests: Any, replies: Any) -> None:
    while (buffer := requests.get()) is not None:
        mine = torch.empty_like(buffer)
        seconds = _best_seconds(partial(mine.copy_, buffer))
        replies.put((int(checksum(mine)), seconds))
        del buffer, mine


def collectives(setting: Setting) -> Figures:
    """Broadcast and all-reduce over the ranks of a group (NCCL on GPUs): right, and how fast."""
    num_ranks = 2 if setting.is_dry else setting.num_gpus
    store = open_store(0, "127.0.0.1", 0, TIMEOUT_S)
    run_ranks("nccl", setting, num_ranks, store.port)
    figures: dict[str, str] = json.loads((setting.folder / "collectives.json").read_text())
    return [("ranks", str(num_ranks)), *figures.items()]


def collective_rank(setting: Setting, rank: int, num_ranks: int) -> None:
    """One rank of `collectives`, in its process group."""
    size = 2**20 if setting.is_dry else 2**29
    source = _tensor(setting, size)
    mine = source.clone() if rank == 0 else torch.zeros_like(source)
    dist.broadcast(mine, 0)
    if not torch.equal(mine, source):
        raise AssertionError("broadcast gave other numbers")
    ones = torch.ones(size // 4, device=setting.device)
    dist.all_reduce(ones)
    if not bool((ones == num_ranks).all()):
        raise AssertionError("all-reduce gave a wrong sum")
    broadcast_s = _best_seconds(lambda: dist.broadcast(mine, 0))
    reduce_s = _best_seconds(lambda: dist.all_reduce(ones))
    if rank == 0:
        figures = {
            "broadcast": _rate(size, broadcast_s),
            # Each rank sends and receives 2 (n - 1) / n of the bytes.
            "all-reduce, over the link": _rate(int(size * 2 * (num_ranks - 1) / num_ranks), reduce_s),
        }
        (setting.folder / "collectives.json").write_text(json.dumps(figures))
    dist.barrier()
