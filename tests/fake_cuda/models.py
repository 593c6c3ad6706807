"""What computes in the fake processes: a policy in shards, a frozen model, and vLLM's core around a table of weights.

The weights are those of a tiny Llama, and are really moved. Memory is what the plan of a larger model says of each
part, so that a GPU is as full as the plan says exactly where the parts come and go as it assumes.
"""

import threading
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.engines.base import PassReport
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.rollout.step_loop import DecodeRequest, StepOutput
from rlhf.engines.rollout.vllm_core import VllmCore
from rlhf.engines.training.optimizer_swap import OptimizerSwap
from rlhf.engines.training.specs import ScorerSpec, TrainedModelSpec
from rlhf.engines.weight_sync.base import WeightSender
from rlhf.engines.weight_sync.buckets import layer_of
from rlhf.engines.weight_sync.probe import PolicyProbe
from rlhf.engines.weight_sync.vllm_receivers import IpcWeightTransferEngine, NcclWeightTransferEngine
from rlhf.types import FinishReason, FloatArray, Metrics, PackedTokens, StepReport, SyncReport, TrainBatch
from tests.fake_cuda.machine import Process, SleepPool, current, inside

MEDIA = {"ipc": IpcWeightTransferEngine, "nccl": NcclWeightTransferEngine}
TOLERANCE = 1e-3
MEET_TIMEOUT_S = 30.0
LENGTH = 3
"""Tokens of every response."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes on one GPU, by the plan."""

    policy: int
    """What the policy holds between computations."""
    learning: int
    """What it needs in addition for forward and backward passes."""
    swapped: int
    """What it keeps in host memory but for the optimizer's step."""
    reference: int
    rank_process: int
    """Of the process of a GPU's models."""
    engine_process: int
    """With CUDA graphs."""
    engine_weights: int
    kv_cache: int


def log_prob(weights: Mapping[str, torch.Tensor]) -> float:
    """What a model with these weights says of every token."""
    return -1.0 - sum(float(weights[name].float().mean()) for name in sorted(weights))


class Gathered:
    """In place of `deepspeed.zero.GatheredParameters`: all ranks gather the same parameters."""

    def __init__(self, parameters: Sequence[Any]) -> None:
        self._parameters = parameters
        self._bytes = sum(p.ds_numel * p.ds_tensor.element_size() for p in parameters)

    def __enter__(self) -> None:
        process = own_process()
        process.malloc(self._bytes)
        what = f"all_gather of {[tuple(p.ds_shape) for p in self._parameters]}"
        ranks: Any = process.group.call(process.rank, what, [p.ds_tensor for p in self._parameters])
        for index, parameter in enumerate(self._parameters):
            whole = torch.cat([shards[index] for shards in ranks])[: parameter.ds_numel]
            parameter.data = whole.view(parameter.ds_shape)

    def __exit__(self, *_: object) -> None:
        for parameter in self._parameters:
            parameter.data = parameter.data.new_empty(0)
        own_process().free(self._bytes)


class Movable:
    """Optimizer states, as far as `OptimizerSwap` asks: bytes on the GPU or in host memory."""

    def __init__(self, process: Process, nbytes: int, device: torch.device) -> None:
        self._process = process
        self._nbytes = nbytes
        self.device = device
        if device.type == "cuda":
            process.malloc(nbytes)
        else:
            process.node.host_bytes += nbytes

    @classmethod
    def __torch_function__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> "Movable":
        assert func is torch.empty_like
        like = args[0]
        return cls(like._process, like._nbytes, torch.device(kwargs["device"]))

    def to(self, device: torch.device, *, non_blocking: bool) -> "Movable":
        assert non_blocking
        return self if device == self.device else Movable(self._process, self._nbytes, device)

    def copy_(self, other: "Movable", *, non_blocking: bool) -> None:
        """Nothing is looked at."""

    @property
    def data(self) -> "Movable":
        return self

    @data.setter
    def data(self, other: "Movable") -> None:
        """The memory on the GPU goes with the last tensor there; a host copy is kept by who made it."""
        if self.device.type == "cuda" and other.device.type == "cpu":
            self._process.free(self._nbytes)
        self.device = other.device


def own_process() -> Process:
    process = current()
    assert process is not None
    return process


class ShardedPolicy:
    """In place of `DeepSpeedEngine`: the shards of ZeRO-3, sent by the real senders."""

    sizes: Sizes

    def __init__(self, spec: TrainedModelSpec, objectives: object, *, device: str, where: str) -> None:
        del objectives, where
        assert device == "cuda"
        self.self_test = SimpleNamespace(notes=())
        self._process = own_process()
        self._process.malloc(self.sizes.rank_process + self.sizes.policy)
        self.module = sharded(Path(spec.model), self._process.rank, self._process.group._size)
        self._sender: WeightSender | None = None
        self._on_device: Callable[[], AbstractContextManager[None]] = nullcontext
        if spec.section.swap_optimizer:
            states = [Movable(self._process, self.sizes.swapped, cuda := torch.device("cuda", 0))]
            engine = SimpleNamespace(device=cuda, optimizer=SimpleNamespace(fp32_partitioned_groups_flat=states))
            optimizer: Any = SimpleNamespace(state={})
            self._on_device = OptimizerSwap(engine, optimizer).on_device

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        return [np.zeros(len(batch.token_ids), np.float32) for batch in batches]

    def forward_backward(self, batches: Sequence[TrainBatch]) -> PassReport:
        self._process.malloc(self.sizes.learning)
        self._process.free(self.sizes.learning)
        return PassReport(metrics=Metrics(sums={"batches": float(len(batches))}))

    def optim_step(self) -> StepReport:
        with self._on_device():
            for parameter in self.module.parameters():
                parameter.ds_tensor += 0.5
        return StepReport(grad_norm=1.0, lr=0.1, finite=True, unmoved=())

    def attach_sender(self, sender: WeightSender) -> None:
        self._sender = sender

    def detach_sender(self) -> None:
        if self._sender is not None:
            self._sender.close()

    def send_weights(self, version: int) -> SyncReport:
        assert self._sender is not None
        return self._sender.send(version)

    def probe(self, packed: PackedTokens) -> PolicyProbe:
        with Gathered(list(self.module.parameters())):
            said = log_prob({name: parameter.detach() for name, parameter in self.module.named_parameters()})
        log_probs = np.full(len(packed.token_ids), said, np.float32)
        return PolicyProbe(log_probs=log_probs, alone=log_probs, tolerance=TOLERANCE)


def sharded(folder: Path, rank: int, num_ranks: int) -> Any:
    """The model of a folder, with what ZeRO-3 adds to each parameter of one rank."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    stored = load_file(folder / "model.safetensors")
    for name, parameter in list(model.named_parameters()):
        flat = stored[name].to(torch.bfloat16).flatten()
        size = -(-flat.numel() // num_ranks)
        part: Any = torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16))
        part.ds_id, part.ds_shape, part.ds_numel = name, parameter.shape, flat.numel()
        part.ds_tensor = torch.nn.functional.pad(flat, (0, size * num_ranks - flat.numel()))[rank * size :][
            :size
        ].clone()
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, part)
    return model


class FrozenModel:
    """In place of `ScoringEngine`."""

    sizes: Sizes

    def __init__(self, spec: ScorerSpec, *, device: str, where: str) -> None:
        del spec, where
        assert device == "cuda"
        self.self_test = SimpleNamespace(notes=())
        own_process().malloc(self.sizes.reference)


class Table(torch.nn.Module):
    """The model of one of vLLM's workers: the layers of its stage. The last stage has what is not in layers too."""

    def __init__(self, pool: SleepPool, stage: int, num_stages: int) -> None:
        super().__init__()
        self.weights: dict[str, torch.Tensor] = {}
        self._pool = pool
        self._stage, self._num_stages = stage, num_stages

    def owns(self, name: str) -> bool:
        """Whether a tensor is in this stage."""
        layer = layer_of(name) or str(self._num_stages - 1)
        return int(layer.rpartition(".")[2]) % self._num_stages == self._stage

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        self._pool.require("weights")
        loaded = {name: tensor.clone() for name, tensor in weights if self.owns(name)}
        self.weights |= loaded
        return set(loaded)


class VllmWorker:
    """One of vLLM's workers, on one GPU."""

    def __init__(self, process: Process, local_rank: int, spec: EngineSpec, sizes: Sizes) -> None:
        self.process = process
        self.local_rank = local_rank
        width = spec.section.devices_per_engine
        rank = spec.part.index * (width // spec.section.num_nodes_per_engine) + local_rank
        with self.on_device():
            gpu = process.gpu()
            wanted = spec.section.gpu_memory_utilization * gpu.total
            if gpu.total - gpu.used < wanted:  # vLLM's check when it starts
                raise ValueError(f"Free memory on {gpu.uuid} is less than desired GPU memory utilization")
            gpu.take(process, sizes.engine_process)
            self.pool = SleepPool(process, gpu)
            self.pool.allocate("weights", sizes.engine_weights)
            self.pool.allocate("kv_cache", sizes.kv_cache)
            parallel = SimpleNamespace(rank=rank, data_parallel_index=0, world_size=width)
            vllm_config: Any = SimpleNamespace(parallel_config=parallel, model_config=SimpleNamespace())
            config: Any = None
            stages = spec.section.pipeline_parallel_size
            self.model = Table(self.pool, rank * stages // width, stages)
            medium = MEDIA[spec.sync_backend]
            self.weight_transfer_engine = medium(config, vllm_config, torch.device("cuda", local_rank), self.model)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """This thread is the worker's main thread, inside the block."""
        with inside(self.process):
            self.process.set_device(self.local_rank)
            yield

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        engine = self.weight_transfer_engine
        engine.init_transfer_engine(engine.parse_init_info(init_info))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        gpu = self.process.gpu()
        gpu.peak_of_update = max(gpu.peak_of_update, gpu.used)
        self.weight_transfer_engine.update_weights(update_info)
        gpu.peak_of_update = max(gpu.peak_of_update, gpu.used)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.weight_transfer_engine, name)


class FakeLlm:
    """vLLM's engine: calls of its workers, and sleep mode."""

    def __init__(self, workers: Sequence[VllmWorker]) -> None:
        self.workers = workers
        self.num_prefix_resets = 0
        self._threads = ThreadPoolExecutor(len(workers))

    def collective_rpc(self, method: Callable[..., Any], args: Sequence[Any] = ()) -> list[Any]:
        def run(worker: VllmWorker) -> Any:
            with worker.on_device():
                return method(worker, *args)

        return list(self._threads.map(run, self.workers))

    def sleep(self, level: int) -> None:
        assert level == 1
        for worker in self.workers:
            worker.pool.suspend(on_host="weights")

    def wake_up(self, tags: list[str] | None = None) -> None:
        for worker in self.workers:
            worker.pool.resume(tags, on_host="weights")

    def reset_prefix_cache(self, reset_running_requests: bool) -> None:
        assert reset_running_requests
        self.num_prefix_resets += 1


def started_workers(spec: EngineSpec, sizes: Sizes) -> list[VllmWorker]:
    """vLLM's workers of an engine on this node: in processes of their own, unless there is only one in all."""
    process = own_process()
    assert spec.section.num_nodes_per_engine == 1 or spec.part.host == process.node.address, "the address of another"
    if spec.section.devices_per_engine == 1:
        return [VllmWorker(process, 0, spec, sizes)]
    width = spec.section.devices_per_engine // spec.section.num_nodes_per_engine
    names = [f"{process.name} worker {rank}" for rank in range(width)]
    processes = [Process(process.node, process.environ, name) for name in names]
    return [VllmWorker(one, rank, spec, sizes) for rank, one in enumerate(processes)]


class Meetings:
    """Where the parts of engines meet, by address and port: each waits for the others of its engine."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._came: dict[tuple[str, int], dict[int, list[VllmWorker]]] = {}

    def join(self, spec: EngineSpec, workers: list[VllmWorker]) -> list[VllmWorker]:
        """The workers of all parts of an engine, in the order of their ranks."""
        if spec.section.num_nodes_per_engine == 1:
            return workers
        with self._changed:
            parts = self._came.setdefault((spec.part.address, spec.part.port), {})
            assert spec.part.index not in parts, "two parts of one engine have the same number"
            parts[spec.part.index] = workers
            self._changed.notify_all()
            complete = self._changed.wait_for(lambda: len(parts) == spec.section.num_nodes_per_engine, MEET_TIMEOUT_S)
            assert complete, f"{sorted(parts)} of {spec.section.num_nodes_per_engine} parts came"
            nodes = {part[0].process.node.name for part in parts.values()}
            assert len(nodes) == len(parts), f"parts of one engine share a node of {sorted(nodes)}"
        return [worker for _, part in sorted(parts.items()) for worker in part]


MEETINGS = Meetings()


class FakePart:
    """In place of `VllmPart`: the workers of one node, which the first part's calls reach."""

    sizes: Sizes

    def __init__(self, spec: EngineSpec) -> None:
        self._workers = started_workers(spec, self.sizes)
        self._closed = threading.Event()
        MEETINGS.join(spec, self._workers)

    def wait(self) -> bool:
        return self._closed.wait()

    def close(self) -> None:
        for worker in self._workers:
            worker.process.end()
        self._closed.set()


class FakeCore(VllmCore):
    """vLLM's core, whose model says the same of every token. Weights come through the real receiving engines."""

    sizes: Sizes

    def __init__(self, spec: EngineSpec) -> None:
        self._adapters = None
        self._keeps_kv_cache, self._num_updates = False, 0
        self._own = started_workers(spec, self.sizes)
        self.workers = MEETINGS.join(spec, self._own)
        self.llm: Any = FakeLlm(self.workers)
        self._waiting: dict[str, DecodeRequest] = {}
        self._width = spec.section.tensor_parallel_size

    def add(self, request_id: str, request: DecodeRequest) -> None:
        self._waiting[request_id] = request

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._waiting.pop(request_id, None)

    def step(self) -> list[StepOutput]:
        for worker, tag in product(self.workers, ("weights", "kv_cache")):
            worker.pool.require(tag)
        stages = [[one.model.weights for one in self.workers[i :: self._width]] for i in range(self._width)]
        said = {log_prob(ChainMap(*weights)) for weights in stages}
        assert len(said) == 1, "the workers of an engine have different weights"
        (value,) = said
        done, self._waiting = self._waiting, {}
        return [StepOutput(name, [7] * LENGTH, [value] * LENGTH, finish_reason=FinishReason.LENGTH) for name in done]

    def shutdown(self) -> None:
        for worker in self._own:
            worker.process.end()
