"""How long the phases of a step take, from the model's arithmetic and the device's data sheet.

Each phase takes the longest of computing, reading memory and communicating. `Efficiency` holds the shares of the peak
that real systems reach; a calibration replaces them by a run's own measurements.
"""

from dataclasses import dataclass, replace
from math import ceil, inf

from rlhf.planning.hardware import GB, TERA, DeviceSheet
from rlhf.planning.memory import FLOAT32, ModelLoad, swapped
from rlhf.planning.model_shape import ModelShape
from rlhf.planning.workload import Workload

BACKWARD = 2.0
"""Arithmetic of a backward pass, in forward passes: gradients of activations, and of the weights that learn."""
FROZEN_BACKWARD = 1.0
HOST_LINK_GB_S = 25.0
"""From a device to its host's memory."""
HOST_ADAM_GB_S = 10.0
"""Optimizer states that the host CPU updates, for each device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Shares of the peak, and fixed costs in seconds."""

    learning: float = 0.4
    scoring: float = 0.45
    prefill: float = 0.5
    reading: float = 0.6
    """Of memory bandwidth, while tokens are decoded one by one."""
    exchange: float = 0.7
    """Of links and networks."""
    decode_step_s: float = 0.004
    """Cost of each decoded token besides arithmetic: launching, scheduling, sampling."""
    micro_batch_s: float = 0.02
    """Cost of each forward or backward pass besides arithmetic."""
    network_reduce_s: float = 0.00003
    """Cost of each message over nodes besides its bytes: tensor parallelism makes two all-reduces in each layer, and a
    pipeline hands on the hidden states between its stages."""


USUAL = Efficiency()


def boundless(rates: Efficiency) -> Efficiency:
    """The fixed costs alone, as on infinitely fast devices."""
    return replace(rates, learning=inf, scoring=inf, prefill=inf, reading=inf, exchange=inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The devices of one group, for timing."""

    sheet: DeviceSheet
    num_nodes: int
    """Nodes that the group is spread over."""

    @property
    def exchange_gb_s(self) -> float:
        """Bandwidth of one device to others of its group; across nodes, its share of the network."""
        return self.sheet.link_gb_s if self.num_nodes == 1 else min(self.sheet.link_gb_s, self.sheet.network_gb_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engines:
    """The rollout engines of a run, for timing."""

    number: int
    tensor_parallel: int
    stages: int = 1
    """Of the pipeline in each, with `tensor_parallel` devices each."""
    num_nodes: int
    """Nodes that each is spread over."""
    max_seqs: int
    """Responses that each decodes at once."""

    @property
    def nodes_of_stage(self) -> int:
        """Most nodes that one stage is spread over. Nodes have equally many devices, which the stages take in turn."""
        each = max(1, self.tensor_parallel * self.stages // self.num_nodes)
        firsts = range(0, self.tensor_parallel * self.stages, self.tensor_parallel)
        return max((first + self.tensor_parallel - 1) // each - first // each + 1 for first in firsts)


def generation(
    shape: ModelShape, dtype_bytes: int, work: Workload, engines: Engines, *, sheet: DeviceSheet, rates: Efficiency
) -> float:
    """Seconds in which the engines sample the responses of a step.

    An engine decodes up to `max_seqs` responses at once. Each of its steps reads the weights once and the KV cache of
    every response, or is bound by arithmetic. If the longest response takes more steps than that, the rest of it is
    decoded almost alone: these steps read the weights.

    The stages of a pipeline compute for different responses at the same time: each reads its weights once for those,
    so that a token of every response takes as long as all weights take on one stage's devices.
    """
    responses = ceil(work.sampled / engines.number)
    if not responses:
        return 0.0
    side_by_side = min(responses, engines.max_seqs)
    context = work.prompt_tokens + work.response_tokens / 2
    stages_at_once = min(engines.stages, side_by_side)
    peak = sheet.tflops * TERA * engines.tensor_parallel * stages_at_once
    bytes_per_s = sheet.memory_gb_s * GB * engines.tensor_parallel * rates.reading
    weights = shape.num_parameters * dtype_bytes / bytes_per_s
    cache = side_by_side * context * shape.kv_numbers_per_token * dtype_bytes / stages_at_once
    reading = weights + cache / bytes_per_s
    computing = side_by_side * shape.flops_per_token(context) / (peak * rates.prefill)
    steps = responses * work.response_tokens / side_by_side
    token_s = _reduce_s(shape, dtype_bytes, engines, sheet, rates)
    messages = 2 * shape.num_layers if engines.nodes_of_stage > 1 else engines.stages - 1
    reduces_s = messages * rates.network_reduce_s if engines.num_nodes > 1 else 0.0
    alone = weights + token_s + reduces_s + rates.decode_step_s
    together = max(reading, computing) + side_by_side * token_s + reduces_s + rates.decode_step_s
    tail = max(0.0, work.least_decoded - steps) * alone
    prompt_s = shape.flops_per_token(work.prompt_tokens / 2) / (peak * rates.prefill) + token_s
    return steps * together + tail + responses * work.prompt_tokens * prompt_s


def scoring(load: ModelLoad, num_tokens: float, work: Workload, machine: Machine, rates: Efficiency) -> float:
    """Seconds for one forward pass over `num_tokens`."""
    if not num_tokens:
        return 0.0
    each = num_tokens / load.num_ranks
    flops = each * load.shape.flops_per_token(work.sequence_tokens / 2)
    batches = ceil(each * load.sequence_parallel / work.micro_batch_tokens)
    computing = flops / (machine.sheet.tflops * TERA * rates.scoring)
    exchanging = batches * _gather_s(load, machine, rates) + each * _all_to_all_s(load, machine, rates)
    return max(computing, exchanging) + batches * rates.micro_batch_s


def learning(load: ModelLoad, work: Workload, machine: Machine, rates: Efficiency) -> float:
    """Seconds of all epochs over a step's sequences, including optimizer steps."""
    each = work.learned_tokens / load.num_ranks
    forwards = 1 + (FROZEN_BACKWARD if load.adapter_rank else BACKWARD) + load.gradient_checkpointing
    forwards += _chunked_share(load, work)
    flops = each * load.shape.flops_per_token(work.sequence_tokens / 2) * forwards
    updates = max(1, work.num_updates // work.num_passes)
    batches = updates * ceil(each / updates * load.sequence_parallel / work.micro_batch_tokens)
    computing = flops / (machine.sheet.tflops * TERA * rates.learning)
    passes = 2 + load.gradient_checkpointing
    exchanging = batches * _exchange_s(load, machine, rates) + each * passes * _all_to_all_s(load, machine, rates)
    # After each update the first gather is over the network even with a second copy of the parameters.
    exchanging += updates * (_first_gather_s(load, machine, rates) - _gather_s(load, machine, rates))
    one_pass = max(computing, exchanging) + each * _offload_s(load) + 2 * batches * rates.micro_batch_s
    return work.num_passes * one_pass + work.num_updates * _optimizer_s(load, machine, rates)


def sync(num_bytes: float, *, same_device: bool, machine: Machine, rates: Efficiency) -> float:
    """Seconds of a weight sync to every engine: over the network, or within the device's own memory."""
    sheet = machine.sheet
    speed = sheet.memory_gb_s if same_device else sheet.network_gb_s
    return num_bytes / (speed * GB * rates.exchange)


def _reduce_s(shape: ModelShape, dtype_bytes: int, engines: Engines, sheet: DeviceSheet, rates: Efficiency) -> float:
    """For each token of an engine whose stages are spread over nodes: its all-reduces over the network, two in each
    layer, to which every device of a node adds its port."""
    nodes = engines.nodes_of_stage
    if nodes == 1:
        return 0.0
    sent = 2 * (nodes - 1) / nodes * 2 * shape.num_layers * shape.hidden * dtype_bytes
    ports = engines.tensor_parallel / nodes
    return sent / (sheet.network_gb_s * GB * ports * rates.exchange)


def _gather_s(load: ModelLoad, machine: Machine, rates: Efficiency) -> float:
    """One all-gather of a partitioned model's parameters; of their second copy in a node, if there is one."""
    if load.hpz_size == 1 or not load.is_partitioned:
        return _first_gather_s(load, machine, rates)
    return load.held_bytes * (load.hpz_size - 1) / load.hpz_size / (machine.sheet.link_gb_s * GB * rates.exchange)


def _first_gather_s(load: ModelLoad, machine: Machine, rates: Efficiency) -> float:
    """One all-gather of a partitioned model's parameters from all ranks."""
    if not load.is_partitioned:
        return 0.0
    seconds = _from_others(load, load.held_bytes) / (machine.exchange_gb_s * GB * rates.exchange)
    host = load.held_bytes / load.num_ranks / (HOST_LINK_GB_S * GB) if load.offload_parameters else 0.0
    return max(seconds, host)


def _from_others(load: ModelLoad, num_bytes: float) -> float:
    """Of `num_bytes` of all parameters, those that a rank gets from others when it gathers what it computes with. The
    experts that it has among others are partitioned over the ranks that have the same ones."""
    split = num_bytes * load.split_parameters / load.shape.num_parameters
    others = (load.num_ranks - 1) / load.num_ranks
    others_with_same = 1 - load.expert_parallel / load.num_ranks
    return (num_bytes - split) * others + split / load.expert_parallel * others_with_same


def _all_to_all_s(load: ModelLoad, machine: Machine, rates: Efficiency) -> float:
    """One pass over one of a rank's tokens. Where ranks compute together, queries, keys and values of each layer go to
    the ranks of their heads, and what attention gives comes back. Where ranks have experts among them, a token's hidden
    state goes to each of its experts, and what that gives comes back."""
    shape = load.shape
    heads = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    experts = 2 * shape.experts_per_token * shape.hidden
    numbers = heads * (1 - 1 / load.sequence_parallel) + experts * (1 - 1 / load.expert_parallel)
    return shape.num_layers * numbers * load.dtype_bytes / (machine.exchange_gb_s * GB * rates.exchange)


def _chunked_share(load: ModelLoad, work: Workload) -> float:
    """The feed-forward layers' share of a forward pass, if their chunks are computed again in the backward pass."""
    if not load.mlp_chunk_tokens:
        return 0.0
    shape = load.shape
    flops = 2.0 * shape.num_layers * 3 * shape.hidden * shape.intermediate
    return flops / shape.flops_per_token(work.sequence_tokens / 2)


def _offload_s(load: ModelLoad) -> float:
    """For each of a rank's tokens: the layers' inputs go to host memory and come back."""
    if not load.offload_activations:
        return 0.0
    return 2 * load.shape.num_layers * load.shape.hidden * load.dtype_bytes / (HOST_LINK_GB_S * GB)


def _exchange_s(load: ModelLoad, machine: Machine, rates: Efficiency) -> float:
    """Communication of the forward and backward pass of one micro-batch: ZeRO-3 gathers twice, and every stage from 1
    on reduces the gradients."""
    if load.num_ranks == 1 or load.zero_stage == 0:
        return 0.0
    reduced = _from_others(load, load.learned_parameters * load.dtype_bytes)
    reducing = reduced / (machine.exchange_gb_s * GB * rates.exchange)
    return 2 * _gather_s(load, machine, rates) + reducing


def _optimizer_s(load: ModelLoad, machine: Machine, rates: Efficiency) -> float:
    """One optimizer step: every state is read and written once, by the device or, if offloaded, by its host; what is
    swapped moves to the device and back."""
    share = load.num_ranks if load.zero_stage else 1
    states = load.learned_parameters / share * 2 * (4 * FLOAT32)
    speed = HOST_ADAM_GB_S if load.offload_optimizer else machine.sheet.memory_gb_s * rates.reading
    return states / (speed * GB) + 2 * swapped(load) / load.num_ranks / (HOST_LINK_GB_S * GB)
