"""How much of a device's memory a model needs, part by part, and of its node's host memory.

Bytes are those of DeepSpeed's ZeRO (Rajbhandari et al. 2020) with the settings that this package trains with: AdamW
with float32 master weights and moments, gradients accumulated in float32. Activations are those of a Llama layer with
an attention kernel that never materializes the score matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import ceil
from operator import attrgetter
from typing import Self

from rlhf.planning.model_shape import ModelShape

FLOAT32 = 4
MOMENTS = 2 * FLOAT32
MAX_LIVE_PARAMETERS = 10**9
"""DeepSpeed prefetches up to this many parameters of a partitioned model."""
FOUR_BITS = 0.5 + FLOAT32 / 64
"""Bytes of a weight in NormalFloat, including its share of its block's scale."""
REDUCE_BUCKET = 5 * 10**8
"""Gradients in DeepSpeed's reduce buffer."""
EXPORT_FILE = 5e9
"""Largest file of an export (`MAX_SHARD` of `rlhf.engines.training.stored_model`)."""
CHECKSUM = 2 * 8 * 2**24
"""Most bytes that a checksum on a GPU takes at a time: a copy of a chunk of weights, and an array as large."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes by purpose."""

    parameters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    gathered: float = 0.0
    """Whole layers of a partitioned model, and buffers of collectives."""
    logits: float = 0.0
    kv_cache: float = 0.0
    sync: float = 0.0
    """Buckets of weights on their way to the rollout engines."""
    process: float = 0.0
    """Libraries, device contexts and communicators."""

    @property
    def total(self) -> float:
        return float(sum(parts_of(self)))

    def times(self, factor: float) -> Self:
        """Every part multiplied."""
        return type(self)(**{name: part * factor for name, part in zip(PARTS, parts_of(self), strict=True)})

    def __add__(self, other: Self) -> Self:
        both = zip(PARTS, parts_of(self), parts_of(other), strict=True)
        return type(self)(**{name: ours + theirs for name, ours, theirs in both})


PARTS = tuple(field.name for field in fields(Memory))
parts_of: Callable[[Memory], tuple[float, ...]] = attrgetter(*PARTS)
"""The parts of a memory: a search for a placement adds up a hundred thousand."""
NOTHING = Memory()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLoad:
    """A model on `num_ranks` ranks, as each of them holds it."""

    shape: ModelShape
    num_ranks: int
    dtype_bytes: int
    learns: bool
    zero_stage: int
    """The stage that the ranks really use."""
    hpz_size: int = 1
    """Ranks of a node that hold a second copy of the parameters among them; 1: none."""
    in_four_bits: bool = False
    """Whether the linear layers' weights are in 4 bits."""
    offload_parameters: bool = False
    offload_optimizer: bool = False
    swap_optimizer: bool = False
    gradient_checkpointing: bool = False
    offload_activations: bool = False
    """Whether what checkpointed layers keep is in host memory."""
    mlp_chunk_tokens: int = 0
    """Tokens that feed-forward layers compute at once; 0: all."""
    chunk_tokens: int = 1024
    kept_log_probs: float = 0.0
    """Most bytes of log-probs that are kept for the backward pass."""
    sequence_parallel: int = 1
    """Ranks that compute each micro-batch together, each its share of the tokens."""
    expert_parallel: int = 1
    """Ranks that have the experts of each layer among them."""
    adapter_rank: int = 0
    """Rank of the adapters that learn instead of the model; 0: the model learns."""
    adapts_experts: bool = False
    """Whether the experts of each layer have adapters too. They are merged in each pass."""
    on_cpu: bool = False
    """On a CPU, a buffer only needs memory for the part that is used."""

    @property
    def parameter_bytes(self) -> float:
        """Bytes of the whole model in the dtype that it computes in."""
        return float(self.shape.num_parameters * self.dtype_bytes)

    @property
    def held_bytes(self) -> float:
        """Bytes of the whole model as it is held."""
        packed = self.shape.linear_parameters if self.in_four_bits else 0
        return self.parameter_bytes - packed * (self.dtype_bytes - FOUR_BITS)

    @property
    def learned_parameters(self) -> int:
        """Parameters with a gradient and optimizer states."""
        if not self.adapter_rank:
            return self.shape.num_parameters
        return self.shape.adapter_parameters(self.adapter_rank, on_experts=self.adapts_experts)

    @property
    def is_partitioned(self) -> bool:
        """Whether each rank holds a part of the parameters."""
        return self.zero_stage == 3

    @property
    def split_parameters(self) -> int:
        """Parameters of all experts, if ranks have them among them."""
        return self.shape.num_layers * self.shape.expert_parameters if self.expert_parallel > 1 else 0

    @property
    def gathered_parameters(self) -> int:
        """Parameters that a rank computes with: all, but of experts that are spread over ranks its own."""
        return self.shape.num_parameters - self.split_parameters + self.split_parameters // self.expert_parallel

    @property
    def second_bytes(self) -> float:
        """Bytes of a rank's part of the second copy of the parameters, which follows where the first one is."""
        return self.held_bytes / self.hpz_size if self.is_partitioned and self.hpz_size > 1 else 0.0


def resident(load: ModelLoad) -> Memory:
    """What stays in device memory between computations."""
    share = 1 / load.num_ranks
    numbers = float(load.learned_parameters)
    parameters = load.held_bytes * (share if load.is_partitioned else 1.0) + load.second_bytes
    if load.is_partitioned and load.offload_parameters:
        parameters = 0.0
    if not load.learns:
        return Memory(parameters=parameters)
    sharded = share if load.zero_stage >= 1 else 1.0
    has_master = load.zero_stage >= 1 or load.dtype_bytes < FLOAT32
    is_away = load.offload_optimizer or swapped(load) > 0
    optimizer = 0.0 if is_away else numbers * (MOMENTS + FLOAT32 * has_master) * sharded
    gradients = numbers * FLOAT32 * (share if load.zero_stage >= 2 else 1.0)
    if load.zero_stage == 0:
        gradients = numbers * load.dtype_bytes
    elif load.offload_optimizer:
        gradients = 0.0
    return Memory(parameters=parameters, gradients=gradients, optimizer=optimizer)


def host(load: ModelLoad) -> float:
    """Bytes of host memory for what one rank offloads."""
    parameters = load.held_bytes if load.is_partitioned and load.offload_parameters else 0.0
    second = load.second_bytes if parameters else 0.0
    states = load.learned_parameters * (MOMENTS + 2 * FLOAT32) if load.learns and load.offload_optimizer else 0.0
    return (parameters + states + swapped(load)) / load.num_ranks + second


def host_activations(load: ModelLoad, num_tokens: int) -> float:
    """Bytes of host memory for the layers' inputs that one rank offloads while it learns from one packed micro-batch.
    Page-locked memory comes in powers of two. A CPU has no other memory."""
    if not load.offload_activations or load.on_cpu:
        return 0.0
    each = ceil(num_tokens / load.sequence_parallel) * load.shape.hidden * load.dtype_bytes
    return float(load.shape.num_layers * 2 ** (each - 1).bit_length())


def reading(load: ModelLoad) -> float:
    """Bytes of host memory that rank 0 needs while it loads the model. On a CPU the parameters are in host memory
    anyway."""
    return 0.0 if load.on_cpu else load.parameter_bytes


def exporting(load: ModelLoad) -> float:
    """Bytes of host memory that rank 0 needs while it exports the model, and loads the first export to compare it: a
    file of weights, and what is converted with its last tensor or the next file. Experts that a layer holds as one
    tensor are joined in memory when they are loaded. Nothing is counted without GPUs: all memory is host memory there,
    and plans have no phase for an export."""
    if load.on_cpu:
        return 0.0
    whole = float(load.parameter_bytes)
    if load.shape.num_active_parameters < load.shape.num_parameters:
        return whole
    return min(whole, EXPORT_FILE + max(EXPORT_FILE, float(largest_matrix(load.shape) * load.dtype_bytes)))


def resuming(load: ModelLoad) -> float:
    """Bytes of host memory that one rank needs while it resumes: DeepSpeed reads the rank's weights, and its part of
    master weights and moments, into host memory first. A save copies one tensor of them after the other. As for
    exports, nothing is counted without GPUs."""
    if load.on_cpu or not load.learns:
        return 0.0
    weights = load.learned_parameters * load.dtype_bytes / (load.num_ranks if load.is_partitioned else 1)
    states = load.learned_parameters * (MOMENTS + FLOAT32) / (load.num_ranks if load.zero_stage else 1)
    return weights + states


def swapped(load: ModelLoad) -> float:
    """Bytes of all ranks that are in host memory between optimizer steps. A CPU has no other memory."""
    moves = load.learns and load.swap_optimizer and not load.on_cpu
    return float(load.learned_parameters * (MOMENTS + FLOAT32)) if moves else 0.0


def gathered(load: ModelLoad) -> float:
    """Whole parameters that a partitioned model holds while it computes, the matrix that is unpacked, and the merged
    experts of a layer, with their gradient or a copy."""
    made = float(load.shape.hidden * load.shape.intermediate * load.dtype_bytes) if load.in_four_bits else 0.0
    if load.adapts_experts:
        made += 2.0 * load.shape.expert_parameters * load.dtype_bytes
    if not load.is_partitioned:
        return made
    live = min(load.gathered_parameters, MAX_LIVE_PARAMETERS)
    bytes_each = load.held_bytes / load.shape.num_parameters
    return max(live * bytes_each, float(_largest_gathered(load) * load.dtype_bytes)) + made


def _largest_gathered(load: ModelLoad) -> int:
    """Parameters that a rank gathers at once while it computes."""
    shape, others = load.shape, (load.expert_parallel - 1) * load.shape.expert_parameters // load.expert_parallel
    return max(shape.layer_parameters - others, shape.embedding_parameters, shape.head_parameters)


def largest_matrix(shape: ModelShape) -> int:
    """Parameters that are gathered at once."""
    return max(shape.layer_parameters, shape.embedding_parameters, shape.head_parameters)


def forward(load: ModelLoad, num_tokens: int) -> Memory:
    """Additional memory during the forward pass of one packed micro-batch."""
    shape, b = load.shape, load.dtype_bytes
    num_tokens = ceil(num_tokens / load.sequence_parallel)
    width = 4 * shape.hidden + shape.num_heads * shape.head_dim
    numbers = num_tokens * width + _mlp_tokens(load, num_tokens) * 3 * shape.intermediate
    activations = float(numbers * b) + _routed(load, num_tokens)
    return Memory(activations=activations, gathered=gathered(load), logits=_logits(load, num_tokens, copies=2))


def learning(load: ModelLoad, num_tokens: int) -> Memory:
    """Additional memory during the forward and backward pass of one packed micro-batch, or during the optimizer step
    after it if that needs more."""
    num_tokens = ceil(num_tokens / load.sequence_parallel)
    mlp = mlp_activations(load.shape, load.dtype_bytes)
    outside = num_tokens * (layer_activations(load.shape, load.dtype_bytes) - mlp) + _routed(load, num_tokens)
    layer = outside + _mlp_tokens(load, num_tokens) * mlp
    kept = outside if load.mlp_chunk_tokens else layer
    if load.gradient_checkpointing:
        is_away = load.offload_activations and not load.on_cpu
        kept = 0.0 if is_away else float(num_tokens * load.shape.hidden * load.dtype_bytes)
    buckets = 0.0
    if load.zero_stage:
        numbers = min(REDUCE_BUCKET, load.learned_parameters) if load.on_cpu else REDUCE_BUCKET
        buckets = numbers * load.dtype_bytes * (1.0 if load.zero_stage == 3 or load.on_cpu else 2.0)
    passes = Memory(
        activations=load.shape.num_layers * kept + 2 * layer,
        gathered=gathered(load) + buckets,
        logits=_logits(load, num_tokens, copies=3) + _kept_log_probs(load, num_tokens) + _head_gradient(load),
    )
    step = Memory(optimizer=swapped(load) / load.num_ranks)
    return max(passes, step, key=lambda memory: memory.total)


def layer_activations(shape: ModelShape, dtype_bytes: int) -> float:
    """Bytes for each token that the backward pass of one layer needs: two float32 copies of the hidden state in the
    norms; the inputs of norms and projections; queries, keys, values and the attention output; four times the width of
    the feed-forward layer."""
    query, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    in_dtype = 4 * shape.hidden + 2 * query + 2 * kv
    in_float32 = 2 * shape.hidden + shape.num_heads + 2
    return in_dtype * dtype_bytes + in_float32 * FLOAT32 + mlp_activations(shape, dtype_bytes)


def mlp_activations(shape: ModelShape, dtype_bytes: int) -> float:
    """The part of `layer_activations` that is inside the feed-forward layer."""
    return float(4 * shape.intermediate * dtype_bytes)


def _mlp_tokens(load: ModelLoad, num_tokens: int) -> int:
    """Tokens that a feed-forward layer computes at once."""
    return min(num_tokens, load.mlp_chunk_tokens or num_tokens)


def _routed(load: ModelLoad, num_tokens: int) -> float:
    """Bytes of a layer's copies of tokens that came from other ranks: what experts read, and what they give. As many
    come as go, where all experts are used alike."""
    if load.expert_parallel == 1:
        return 0.0
    return float(2 * num_tokens * load.shape.experts_per_token * load.shape.hidden * load.dtype_bytes)


def _logits(load: ModelLoad, num_tokens: int, *, copies: int) -> float:
    """Logits are computed in chunks of tokens, in float32."""
    if load.shape.is_scalar:
        return 0.0
    return float(copies * min(num_tokens, load.chunk_tokens) * load.shape.vocab * FLOAT32)


def _kept_log_probs(load: ModelLoad, num_tokens: int) -> float:
    """Log-probs of the whole micro-batch, or none."""
    whole = 0.0 if load.shape.is_scalar else float(num_tokens * load.shape.vocab * FLOAT32)
    return whole if whole <= load.kept_log_probs else 0.0


def _head_gradient(load: ModelLoad) -> float:
    """The output layer's gradient is accumulated over chunks in float32."""
    return 0.0 if load.shape.is_scalar or load.adapter_rank else float(load.shape.vocab * load.shape.hidden * FLOAT32)


def sending(load: ModelLoad, bucket: float) -> Memory:
    """Additional memory of a rank that sends weights in buckets of at least `bucket` bytes: on a GPU a bucket that is
    gathered, its copy, and the buffer that engines read. On a CPU two buckets in turns."""
    largest = float(largest_matrix(load.shape) * load.dtype_bytes)
    if load.on_cpu:
        return Memory(gathered=largest, sync=2 * _bucket(load, bucket))
    return Memory(gathered=largest, sync=2 * max(bucket, largest) + min(CHECKSUM, 2 * largest))


def receiving(load: ModelLoad, bucket: float) -> float:
    """Bytes that one device of an engine needs while it receives weights: on a GPU a copy of the bucket, and the layer
    that is made anew from it. On a CPU two buckets in turns."""
    largest = float(largest_matrix(load.shape) * load.dtype_bytes)
    if load.on_cpu:
        return 2 * _bucket(load, bucket)
    return max(bucket, largest) + largest + min(CHECKSUM, 2 * largest)


def _bucket(load: ModelLoad, bucket: float) -> float:
    return max(bucket, float(load.shape.layer_parameters * load.dtype_bytes))


def kv_cache(shape: ModelShape, dtype_bytes: int, tensor_parallel: int, stages: int, num_tokens: int) -> float:
    """Bytes of the KV cache on one device, for this many tokens, where the layers are in this many stages: of the stage
    with the most layers."""
    parts = min(tensor_parallel, shape.num_kv_heads)
    share = ceil(shape.num_layers / stages) / shape.num_layers
    return shape.kv_numbers_per_token * share * dtype_bytes / parts * num_tokens


def stage_weights(shape: ModelShape, dtype_bytes: int, tensor_parallel: int, stages: int) -> float:
    """Bytes of an engine's weights on one device of the largest stage. The first stage has the embeddings, and the last
    one the output layer, which may be the same."""
    if stages == 1:
        return shape.num_parameters * dtype_bytes / tensor_parallel
    sizes = [layers * shape.layer_parameters for layers in stage_layers(shape.num_layers, stages)]
    sizes[0] += shape.embedding_parameters
    sizes[-1] += (shape.head_parameters or shape.embedding_parameters) + shape.norm_parameters
    return max(sizes) * dtype_bytes / tensor_parallel


def stage_layers(num_layers: int, stages: int) -> list[int]:
    """Layers of each stage. vLLM gives those that are left over to the stages before the last one, from behind."""
    fewest, more = divmod(num_layers, stages)
    return [fewest + (stages - 1 - more <= stage < stages - 1) for stage in range(stages)]


def routes(shape: ModelShape) -> float:
    """Bytes of the record of which experts a token used, of which a number up to 255 takes one."""
    return float(shape.num_layers * shape.experts_per_token * (1 if shape.num_experts <= 255 else 2))
