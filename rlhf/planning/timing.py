"""How long the phases of a step take, from the model's arithmetic and the device's sheet.

Each phase takes the longest of what its devices compute, what they read and what they exchange. The shares of a sheet's
peak that a real system reaches are `Efficiency`; a run's own measurements replace them.
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
"""Optimizer states that a host's cores work through, for each device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Shares of a sheet's peak, and fixed costs in seconds."""

    learning: float = 0.4
    scoring: float = 0.45
    prefill: float = 0.5
    reading: float = 0.6
    """Of memory bandwidth, while tokens are decoded one by one."""
    exchange: float = 0.7
    """Of links and networks."""
    decode_step_s: float = 0.004
    """What every decoded token costs beside arithmetic: launching, scheduling, sampling."""
    micro_batch_s: float = 0.02
    """What every forward or backward pass costs beside arithmetic."""


USUAL = Efficiency()


def boundless(rates: Efficiency) -> Efficiency:
    """The fixed costs alone, as on devices of any speed."""
    return replace(rates, learning=inf, scoring=inf, prefill=inf, reading=inf, exchange=inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The devices of one group as a timing sees them."""

    sheet: DeviceSheet
    num_nodes: int
    """Nodes that the group is spread over."""

    @property
    def exchange_gb_s(self) -> float:
        """What one device exchanges with the others of its group: across nodes, its share of the network."""
        return self.sheet.link_gb_s if self.num_nodes == 1 else min(self.sheet.link_gb_s, self.sheet.network_gb_s)


def generation(
    shape: ModelShape,
    dtype_bytes: int,
    work: Workload,
    *,
    num_engines: int,
    tensor_parallel: int,
    max_seqs: int,
    sheet: DeviceSheet,
    rates: Efficiency,
) -> float:
    """Seconds in which the engines answer a step's prompts.

    An engine decodes up to `max_seqs` responses side by side; each of its steps reads the weights once and every response's
    cache, or is bound by arithmetic.
    """
    responses = ceil(work.sampled / num_engines)
    if not responses:
        return 0.0
    side_by_side = min(responses, max_seqs)
    context = work.prompt_tokens + work.response_tokens / 2
    peak = sheet.tflops * TERA * tensor_parallel
    read = float(shape.num_parameters * dtype_bytes)
    read += side_by_side * context * shape.kv_numbers_per_token * dtype_bytes
    reading = read / (sheet.memory_gb_s * GB * tensor_parallel * rates.reading)
    computing = side_by_side * shape.flops_per_token(context) / (peak * rates.prefill)
    steps = responses * work.response_tokens / side_by_side
    prompts = responses * work.prompt_tokens * shape.flops_per_token(work.prompt_tokens / 2) / (peak * rates.prefill)
    return steps * (max(reading, computing) + rates.decode_step_s) + prompts


def scoring(load: ModelLoad, num_tokens: float, work: Workload, machine: Machine, rates: Efficiency) -> float:
    """Seconds in which a model sees `num_tokens` once."""
    if not num_tokens:
        return 0.0
    each = num_tokens / load.num_ranks
    flops = each * load.shape.flops_per_token(work.sequence_tokens / 2)
    batches = ceil(each / work.micro_batch_tokens)
    computing = flops / (machine.sheet.tflops * TERA * rates.scoring)
    exchanging = batches * _gather_s(load, machine, rates)
    return max(computing, exchanging) + batches * rates.micro_batch_s


def learning(load: ModelLoad, work: Workload, machine: Machine, rates: Efficiency) -> float:
    """Seconds of all passes over a step's sequences, optimizer steps included."""
    each = work.learned_tokens / load.num_ranks
    forwards = 1 + (FROZEN_BACKWARD if load.adapter_rank else BACKWARD) + load.gradient_checkpointing
    flops = each * load.shape.flops_per_token(work.sequence_tokens / 2) * forwards
    updates = max(1, work.num_updates // work.num_passes)
    batches = updates * ceil(each / updates / work.micro_batch_tokens)
    computing = flops / (machine.sheet.tflops * TERA * rates.learning)
    exchanging = batches * _exchange_s(load, machine, rates)
    one_pass = max(computing, exchanging) + 2 * batches * rates.micro_batch_s
    return work.num_passes * one_pass + work.num_updates * _optimizer_s(load, machine, rates)


def sync(num_bytes: float, *, same_device: bool, machine: Machine, rates: Efficiency) -> float:
    """Seconds in which every engine receives weights: over the network, or within the device's own memory."""
    sheet = machine.sheet
    speed = sheet.memory_gb_s if same_device else sheet.network_gb_s
    return num_bytes / (speed * GB * rates.exchange)


def _gather_s(load: ModelLoad, machine: Machine, rates: Efficiency) -> float:
    """One all-gather of a partitioned model's parameters."""
    if not load.is_partitioned:
        return 0.0
    others = (load.num_ranks - 1) / load.num_ranks
    seconds = load.held_bytes * others / (machine.exchange_gb_s * GB * rates.exchange)
    host = load.held_bytes / load.num_ranks / (HOST_LINK_GB_S * GB) if load.offload_parameters else 0.0
    return max(seconds, host)


def _exchange_s(load: ModelLoad, machine: Machine, rates: Efficiency) -> float:
    """What the forward and backward pass of one micro-batch exchange: ZeRO-3 gathers twice, and every stage from 1 on
    reduces the gradients."""
    if load.num_ranks == 1 or load.zero_stage == 0:
        return 0.0
    others = (load.num_ranks - 1) / load.num_ranks
    reducing = load.learned_parameters * load.dtype_bytes * others / (machine.exchange_gb_s * GB * rates.exchange)
    return 2 * _gather_s(load, machine, rates) + reducing


def _optimizer_s(load: ModelLoad, machine: Machine, rates: Efficiency) -> float:
    """One optimizer step: every state is read and written once, by the device or, offloaded, by its host;
    what is swapped crosses to the device and back."""
    share = load.num_ranks if load.zero_stage else 1
    states = load.learned_parameters / share * 2 * (4 * FLOAT32)
    speed = HOST_ADAM_GB_S if load.offload_optimizer else machine.sheet.memory_gb_s * rates.reading
    return states / (speed * GB) + 2 * swapped(load) / load.num_ranks / (HOST_LINK_GB_S * GB)
