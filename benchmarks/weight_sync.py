"""Seconds of one weight sync against the raw collectives that it cannot do without.

    python -m benchmarks.weight_sync [--sizes 1 25 200] [--receivers 1 2] [--repeats 5]

A random Llama of each size is sharded by DeepSpeed ZeRO-3 over two ranks, and synced to one or two receiving
processes, each of which copies what it gets into a model of its own. In the same processes, back to back with each
sync, the raw work is timed: an all-gather of the shards (flat, over the trainer's group) followed by a broadcast of
the same bytes (over the sync's own group), in buckets of the same size, with buffers made beforehand and nothing
computed, checked or loaded. `sync / raw` is the share of the raw speed that a verified, loaded sync keeps.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.engines.distributed import deepspeed, init_distributed
from rlhf.engines.rendezvous import meet
from rlhf.engines.weight_sync.base import Info
from rlhf.engines.weight_sync.buckets import plan_buckets
from rlhf.engines.weight_sync.gloo import GlooReceiver
from rlhf.engines.weight_sync.gloo_group import GlooGroup, GlooInitInfo, GlooUpdateInfo, listen
from rlhf.engines.weight_sync.media import make_sender
from rlhf.engines.weight_sync.source import make_source
from rlhf.types import SyncReport

NUM_TRAINERS = 2
SHAPES = {  # millions of parameters -> hidden size, layers, vocabulary
    1: (128, 4, 1024),
    25: (512, 7, 8192),
    200: (1024, 14, 16384),
}
TIMEOUT_S = 120.0


def make_config(millions: int) -> LlamaConfig:
    hidden, layers, vocabulary = SHAPES[millions]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2816 * hidden // 1024,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=True,
    )


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    millions: int
    num_receivers: int
    repeats: int
    bucket_bytes: int


class Receiver:
    """What a rollout engine does with weights, without the engine: check them and copy them into a model."""

    def __init__(self, case: Case) -> None:
        with torch.device("meta"):
            model = LlamaForCausalLM(make_config(case.millions)).requires_grad_(False)
        model.to_empty(device="cpu")
        self._parameters = {name: parameter.fill_(0.0) for name, parameter in model.named_parameters()}
        self._link: GlooReceiver | None = None
        self._group: GlooGroup | None = None
        self._digest = ""

    def init_weight_transfer(self, info: Info) -> None:
        self._link = GlooReceiver(GlooInitInfo(**info))  # type: ignore[arg-type]

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, info: Info) -> None:
        assert self._link is not None
        self._digest = self._link.receive(GlooUpdateInfo(**info), self._load)  # type: ignore[arg-type]

    def finish_weight_update(self, version: int, digest: str) -> str:
        assert digest == self._digest, version
        return self._digest

    def join_raw(self, port: int, rank: int, world_size: int, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._buffer = torch.ones(max(sizes), dtype=torch.uint8)
        store = torch.distributed.TCPStore("127.0.0.1", port)
        self._group = GlooGroup(store, rank, world_size, TIMEOUT_S)

    def receive_raw(self) -> None:
        assert self._group is not None
        for size in self._sizes:
            self._group.broadcast(self._buffer[:size]).wait()

    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            self._parameters[name].copy_(tensor)


def run_receiver(case: Case, pipe: Connection) -> None:
    receiver = Receiver(case)
    pipe.send("ready")
    while (call := pipe.recv()) is not None:
        method, arguments = call
        pipe.send(getattr(receiver, method)(*arguments))


class PipeClient:
    """`EngineClient` over pipes to receiving processes."""

    def __init__(self, pipes: Sequence[Connection]) -> None:
        self._pipes = pipes

    @property
    def engine_names(self) -> tuple[str, ...]:
        return tuple(f"receiver-{i}" for i in range(len(self._pipes)))

    def call(self, method: str, arguments: Sequence[tuple[object, ...]], timeout_s: float) -> list[object]:
        for pipe, each in zip(self._pipes, arguments, strict=True):
            pipe.send((method, each))
        return self.results(timeout_s)

    def results(self, timeout_s: float) -> list[object]:
        replies = []
        for pipe in self._pipes:
            assert pipe.poll(timeout_s), "a receiver does not answer"
            replies.append(pipe.recv())
        return replies

    def init_weight_transfer(self, init_infos: Sequence[Info], timeout_s: float) -> None:
        self.call("init_weight_transfer", [(info,) for info in init_infos], timeout_s)

    def start_weight_update(self, timeout_s: float) -> None:
        self.call("start_weight_update", [()] * len(self._pipes), timeout_s)

    def update_weights(self, update_info: Info, timeout_s: float) -> None:
        self.call("update_weights", [(update_info,)] * len(self._pipes), timeout_s)

    def finish_weight_update(self, version: int, digest: str, timeout_s: float) -> dict[str, str]:
        digests = self.call("finish_weight_update", [(version, digest)] * len(self._pipes), timeout_s)
        return dict(zip(self.engine_names, map(str, digests), strict=True))


def run_trainer(rank: int, port: int, case: Case, pipes: Sequence[Connection], result: Connection | None) -> None:
    store = meet(rank, "127.0.0.1", port, TIMEOUT_S)
    init_distributed(rank, NUM_TRAINERS, store, device="cpu", timeout_s=TIMEOUT_S)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.float32):
        module = LlamaForCausalLM(make_config(case.millions))
    source = make_source(module, "float32")
    client = PipeClient(pipes)
    if rank == 0:
        client.results(TIMEOUT_S)
    dist.barrier()
    sender = make_sender(
        "gloo",
        source,
        client,
        rank=rank,
        world_size=NUM_TRAINERS,
        master_address="127.0.0.1",
        port=0,
        num_receivers=case.num_receivers,
        bucket_bytes=case.bucket_bytes,
        timeout_s=TIMEOUT_S,
    )
    sizes = [bucket.numel * 4 for bucket in plan_buckets(source.specs(), torch.float32, case.bucket_bytes)]
    raw = RawWork(rank, sizes, client)
    seconds: list[tuple[float, float, float]] = []
    report: SyncReport | None = None
    for repeat in range(case.repeats + 1):
        gather_s = timed(raw.all_gather)
        broadcast_s = timed(raw.broadcast)
        start = time.perf_counter()
        report = sender.send(repeat)
        sync_s = time.perf_counter() - start
        if repeat:  # the first of each warms up
            seconds.append((gather_s, broadcast_s, sync_s))
    if result is not None:
        result.send((report, seconds))
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


def measure(case: Case) -> str:
    """Run one case in processes of its own; returns its line of the table."""
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
        report, seconds = result.recv()
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
    gather_s, broadcast_s, sync_s = (statistics.median(column) for column in zip(*seconds, strict=True))
    share = statistics.median((g + b) / s for g, b, s in seconds)
    return (
        f"{report.num_bytes / 4e6:8.1f} {case.num_receivers:9d} {report.num_buckets:7d} {report.num_remote_calls:6d} "
        f"{gather_s:9.3f} {broadcast_s:9.3f} {sync_s:8.3f} {report.num_bytes / sync_s / 1e9:6.2f} {share:10.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 25, 200], choices=list(SHAPES))
    parser.add_argument("--receivers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bucket-mib", type=float, default=64.0)
    arguments = parser.parse_args()
    print("params M receivers buckets  calls  gather s broadcast   sync s   GB/s  raw / sync", flush=True)
    for millions in arguments.sizes:
        for num_receivers in arguments.receivers:
            case = Case(millions, num_receivers, arguments.repeats, int(arguments.bucket_mib * 2**20))
            print(measure(case), flush=True)


if __name__ == "__main__":
    main()
