"""Seconds and memory of one weight sync, beside the raw collectives and beside a loop over parameters.

    python -m benchmarks.weight_sync [--sizes 1 25 200] [--receivers 1 2] [--repeats 5] [--vllm] [--timeline]

A random Llama of each size is sharded by DeepSpeed ZeRO-3 over two ranks, and synced to one or two receiving
processes, each of which copies what it gets into a model of its own. In the same processes, back to back with each
sync, the raw work is timed: an all-gather of the shards (flat, over the trainer's group) followed by a broadcast of
the same bytes (over the sync's own group), in buckets of the same size, with buffers made beforehand and nothing
computed, checked or loaded. `of raw` is the share of the raw speed that a verified, loaded sync keeps.

Then the same weights go parameter by parameter, as is common: gathered on all ranks, announced to every receiver by a
call of its own, broadcast, loaded. `loop` is how many times as long that takes. Calls cost a pipe's round trip here;
those of a cluster cost more.

Memory is what each process takes at most beyond what it had before the first sync, in buckets (of the largest size).
With `--vllm` the receivers are vLLM engines, whose loader has costs of its own; the loop is left out then.
`--timeline` draws the last sync: when each bucket was gathered and sent.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from benchmarks.sync_receivers import (
    SHAPES,
    TIMEOUT_S,
    Case,
    MemoryMark,
    PipeClient,
    make_config,
    make_model,
    run_receiver,
)
from benchmarks.sync_timeline import TimelineSender
from rlhf.engines.process.distributed import deepspeed, init_distributed
from rlhf.engines.process.rendezvous import open_store
from rlhf.engines.weight_sync.buckets import plan_buckets
from rlhf.engines.weight_sync.gloo import GatherOnlySender
from rlhf.engines.weight_sync.gloo_group import GlooGroup, listen
from rlhf.engines.weight_sync.sources import make_source
from rlhf.types import SyncReport

NUM_TRAINERS = 2
NUM_WARM_UPS = 2


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was seen of a case, by trainer rank 0."""

    report: SyncReport
    seconds: list[tuple[float, float, float]]
    """Gathers alone, broadcasts alone, and the sync, of each repeat."""
    loop_s: float
    """The loop over parameters; 0 where it was left out."""
    extra_bytes: list[int]
    """Of the trainer's ranks, then of the receivers."""
    largest_bucket: int
    timeline: str


def run_trainer(rank: int, port: int, case: Case, pipes: Sequence[Connection], result: Connection | None) -> None:
    store = open_store(rank, "127.0.0.1", port, TIMEOUT_S)
    init_distributed(rank, NUM_TRAINERS, store, device="cpu", timeout_s=TIMEOUT_S)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.float32):
        module = LlamaForCausalLM(make_config(case.millions))
    source = make_source(module, "float32")
    client = PipeClient(pipes)
    if rank == 0:
        client.results(TIMEOUT_S)
    dist.barrier()
    sizes = [bucket.numel * 4 for bucket in plan_buckets(source.specs(), torch.float32, case.bucket_bytes)]
    raw = RawWork(rank, sizes, client)
    raw.all_gather()
    raw.broadcast()
    client.call("mark_memory", [()] * len(pipes), TIMEOUT_S)
    mark = MemoryMark()
    sender = (
        GatherOnlySender(source, bucket_bytes=case.bucket_bytes, timeout_s=TIMEOUT_S)
        if rank
        else TimelineSender(
            source,
            client,
            master_address="127.0.0.1",
            port=0,
            num_receivers=case.num_receivers,
            bucket_bytes=case.bucket_bytes,
            timeout_s=TIMEOUT_S,
        )
    )
    for version in range(NUM_WARM_UPS):
        report = sender.send(version)
    extra: list[int] = [0] * NUM_TRAINERS
    dist.all_gather_object(extra, mark.extra())
    extra += cast(list[int], client.call("extra_memory", [()] * len(pipes), TIMEOUT_S))
    seconds: list[tuple[float, float, float]] = []
    for repeat in range(case.repeats):
        gather_s = timed(raw.all_gather)
        broadcast_s = timed(raw.broadcast)
        start = time.perf_counter()
        report = sender.send(NUM_WARM_UPS + repeat)
        seconds.append((gather_s, broadcast_s, time.perf_counter() - start))
    last = NUM_WARM_UPS + case.repeats
    timeline = ""
    if isinstance(sender, TimelineSender):
        timeline = sender.watched(last)
    else:
        sender.send(last)
    loop_s = 0.0
    if not case.is_vllm:
        loop_s = statistics.median(timed(partial(raw.parameter_by_parameter, module)) for _ in range(case.repeats))
    if result is not None:
        result.send(
            Result(
                report=report,
                seconds=seconds,
                loop_s=loop_s,
                extra_bytes=extra,
                largest_bucket=max(sizes),
                timeline=timeline,
            )
        )
    for pipe in pipes:
        pipe.send(None)
    dist.barrier()
    dist.destroy_process_group()


def timed(work: Callable[[], None]) -> float:
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


class RawWork:
    """The collectives alone, bucket after bucket, on buffers that are there already."""

    def __init__(self, rank: int, sizes: Sequence[int], client: PipeClient) -> None:
        self._sizes = sizes
        self._client = client
        self._rank = rank
        self._full = torch.ones(max(sizes), dtype=torch.uint8)
        self._shard = torch.ones(max(sizes) // NUM_TRAINERS, dtype=torch.uint8)
        if rank == 0:
            world_size = 1 + len(client.engine_names)
            store = listen("127.0.0.1", 0, TIMEOUT_S)
            places = [(store.port, 1 + i, world_size, sizes) for i in range(world_size - 1)]
            for pipe, place in zip(client._pipes, places, strict=True):
                pipe.send(("join_raw", place))
            self._group = GlooGroup(store, 0, world_size, TIMEOUT_S)
            client.results(TIMEOUT_S)

    def all_gather(self) -> None:
        for size in self._sizes:
            dist.all_gather_into_tensor(self._full[:size], self._shard[: size // NUM_TRAINERS])

    def broadcast(self) -> None:
        if self._rank > 0:
            return
        for pipe in self._client._pipes:
            pipe.send(("receive_raw", ()))
        for size in self._sizes:
            self._group.broadcast(self._full[:size]).wait()
        self._client.results(TIMEOUT_S)

    def parameter_by_parameter(self, module: torch.nn.Module) -> None:
        """Gather, announce, broadcast and load each parameter before the next."""
        for name, parameter in module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                if self._rank > 0:
                    continue
                for pipe in self._client._pipes:
                    pipe.send(("receive_parameter", (name, tuple(parameter.shape))))
                self._group.broadcast(parameter.data).wait()
                self._client.results(TIMEOUT_S)


def measure(case: Case) -> Result:
    """Run one case in processes of its own."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ours, theirs = zip(*(context.Pipe() for _ in range(case.num_receivers)), strict=True)
    result, report_to = context.Pipe(duplex=False)
    processes = [context.Process(target=run_receiver, args=(case, pipe)) for pipe in theirs]
    processes += [
        context.Process(
            target=run_trainer, args=(rank, port, case, ours if not rank else (), None if rank else report_to)
        )
        for rank in range(NUM_TRAINERS)
    ]
    for process in processes:
        process.start()
    try:
        while not result.poll(1):
            assert all(process.exitcode in (None, 0) for process in processes), "a process failed"
        found = cast(Result, result.recv())
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
    return found


def row(case: Case, found: Result) -> str:
    """A line of the table."""
    report = found.report
    gather_s, broadcast_s, sync_s = (statistics.median(column) for column in zip(*found.seconds, strict=True))
    share = statistics.median((g + b) / s for g, b, s in found.seconds)
    trainers, receivers = found.extra_bytes[:NUM_TRAINERS], found.extra_bytes[NUM_TRAINERS:]
    trainer, receiver = max(trainers) / found.largest_bucket, max(receivers) / found.largest_bucket
    return (
        f"{report.num_bytes / 4e6:8.1f} {case.num_receivers:9d} {report.num_buckets:7d} {report.num_remote_calls:5d} "
        f"{gather_s:8.3f} {broadcast_s:9.3f} {sync_s:6.3f} {report.num_bytes / sync_s / 1e9:5.2f} {share:6.0%} "
        f"{f'{found.loop_s / sync_s:.1f}' if found.loop_s else '-':>5} {trainer:7.2f} {receiver:8.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 25, 200], choices=list(SHAPES))
    parser.add_argument("--receivers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket-mib", type=float, default=64.0)
    parser.add_argument("--vllm", action="store_true")
    parser.add_argument("--timeline", action="store_true")
    arguments = parser.parse_args()
    print(
        "                                                                               memory, buckets\n"
        "params M receivers buckets calls gather s broadcast sync s  GB/s of raw  loop trainer receiver",
        flush=True,
    )
    for millions in arguments.sizes:
        for num_receivers in arguments.receivers:
            with TemporaryDirectory() as folder:
                size = int(arguments.bucket_mib * 2**20)
                case = Case(millions, num_receivers, arguments.repeats, size, Path(folder), arguments.vllm)
                if case.is_vllm:
                    make_model(case)
                found = measure(case)
            print(row(case, found), flush=True)
            if arguments.timeline:
                print(found.timeline, flush=True)


if __name__ == "__main__":
    main()
