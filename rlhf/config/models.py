"""The models of a run: what is loaded, how it computes, how it learns, how many devices it gets."""

from typing import Literal, Self

from pydantic import Field, FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf.config.base import Section
from rlhf.config.path_text import PathText

DtypeName = Literal["auto", "float32", "bfloat16"]
AttentionName = Literal["auto", "flash_attention_2", "sdpa", "eager"]


def dtype_on(dtype: DtypeName, device: str) -> Literal["float32", "bfloat16"]:
    """The number format on a kind of device: auto is float32 on CPU and bfloat16 on GPUs."""
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else "bfloat16"


class ModelSection(Section):
    """A model that does not learn."""

    model: PathText | None = None
    """Folder or hub name of a Hugging Face model with safetensors weights."""
    dtype: DtypeName = "auto"
    """Number format; auto is float32 on CPU and bfloat16 on GPUs."""
    quantization: Literal["none", "nf4"] = "none"
    """How frozen weights are held. nf4 (QLoRA) holds all linear layers except the output layer in 4 bits a weight; they
    compute in dtype. A model that learns then needs lora.rank above 0. A reference that is the same model as the policy
    is quantized like the policy, unless it is set."""
    attention: AttentionName = "auto"
    """Attention implementation; auto takes flash_attention_2 if it is installed and the model is on a GPU and not in
    float32, else sdpa; and eager where these compute something else than the model's authors (a cap on scores)."""
    float32_head: bool = False
    """Compute logits in float32 where the model is in bfloat16, so that they are not rounded to 8 bits. While the
    output layer runs, it needs 4 more bytes for each of its weights. A reference that is the same model as the policy
    follows the policy, unless it is set."""
    float32_router: bool = False
    """Compute the routers of a mixture of experts in float32 where the model is in bfloat16. A reference follows the
    policy as for float32_head."""
    trust_remote_code: str | None = None
    """Allow the model's own Python code, only as repo@commit. Off by default."""
    num_nodes: PositiveInt = 1
    """Nodes that the model is spread over."""
    num_gpus_per_node: PositiveInt = 1
    """Processes on each node, with one GPU each (without GPUs, one CPU core each)."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """DeepSpeed ZeRO stage: 1 shards optimizer states, 2 also gradients, 3 also parameters (not on a single
    process)."""
    zero_hpz_partition_size: PositiveInt = 1
    """Processes of a node that hold a second copy of a ZeRO-3 model's parameters among them (hpZ of ZeRO++), usually
    all of a node; 1: no second copy. The first pass after a step then gathers parameters from all processes, and all
    others within the node, while each process holds 1 / this size of the parameters more. It must divide
    num_gpus_per_node."""
    sequence_parallel_size: PositiveInt = 1
    """Processes that compute each micro-batch together (Ulysses): each holds the activations of its share of the
    tokens, so that longer sequences fit. Must divide the number of attention heads and of the model's processes."""
    mlp_chunk_tokens: NonNegativeInt = 0
    """Tokens that feed-forward layers compute at once; 0: all of a micro-batch. Activations inside these layers are
    then those of one chunk, and a model that learns computes them once more in the backward pass. A reference follows
    the policy as for float32_head."""
    offload_parameters: bool = False
    """Keep ZeRO-3 parameter shards in host memory."""

    def beside(self, policy: "ModelSection") -> Self:
        """This reference model with what the policy decides: without a model of its own it is the policy's, and the
        policy's model is quantized and computed as in the policy unless set otherwise, because it would otherwise
        differ from what the policy starts as."""
        filled = self if self.model is not None else self.model_copy(update={"model": policy.model})
        if filled.model != policy.model:
            return filled
        names = {"quantization", "float32_head", "float32_router", "mlp_chunk_tokens"} - self.model_fields_set
        return filled.model_copy(update={name: value for name, value in policy if name in names})

    @property
    def num_ranks(self) -> int:
        """Processes in all."""
        return self.num_nodes * self.num_gpus_per_node

    def stage_on(self, num_ranks: int, *, is_float32: bool) -> int:
        """The ZeRO stage that this many ranks really use. A single rank has nothing to shard, and ZeRO-3's hooks would
        take up to half of a small model's step."""
        return self.zero_stage if self._shares(num_ranks) else 0

    def _shares(self, num_ranks: int) -> bool:
        """Whether ranks use the stage that is set. Offloading relies on ZeRO-3's partitioning."""
        return self.zero_stage < 3 or num_ranks > 1 or self.offload_parameters


class LoraSection(Section):
    """LoRA: low-rank adapters that learn instead of the model (Hu et al. 2021)."""

    rank: NonNegativeInt = 0
    """Rank of the adapters on each linear layer; 0 trains the model itself. Adapters need about ten times the
    learning rate of full training."""
    alpha: PositiveFloat = Field(32.0, allow_inf_nan=False)
    """The adapters' output is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of the layers that get adapters (q_proj, v_proj, ...); if empty, all linear layers except the output layer.
    Experts that are one tensor a layer get them if they are named (experts.gate_up_proj, experts.down_proj); routers
    stay as they are."""

    @property
    def expert_targets(self) -> tuple[str, ...]:
        """The targets that are tensors of all experts of a layer."""
        return tuple(target for target in self.targets if target.startswith("experts."))


class TrainedModelSection(ModelSection):
    """A model that learns."""

    lr: PositiveFloat = Field(1e-6, allow_inf_nan=False)
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: float = Field(0.03, ge=0.0, lt=1.0)
    """Share of the run's optimizer steps in which the learning rate rises from 0 to its peak."""
    min_lr_ratio: float = Field(0.1, ge=0.0, le=1.0)
    """Learning rate at the end of the run, as a share of the peak."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moments."""
    adam_eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: FiniteFloat = Field(0.0, ge=0.0)
    """AdamW's weight decay."""
    max_grad_norm: FiniteFloat = Field(1.0, ge=0.0)
    """Clip the gradient's norm to this; 0 does not clip."""
    expert_parallel_size: PositiveInt = 1
    """Processes that have the experts of each layer among them (DeepSpeed's AutoEP): tokens travel to their experts,
    where ZeRO-3 alone brings all experts of a layer to every process. Must divide the number of experts and of the
    model's processes. Needs zero_stage 3."""
    freeze_router: bool = False
    """Leave the routers of a mixture of experts as they are, so that experts keep the tokens that they were trained
    for."""
    lora: LoraSection = LoraSection()
    offload_optimizer: bool = False
    """Keep optimizer states in host memory, and take the optimizer step on the CPU."""
    swap_optimizer: bool = False
    """Keep optimizer states in host memory between steps, and move them to the GPU for the optimizer step. Engines and
    other models on the same GPU can use the memory in between; it costs 24 bytes a parameter over PCIe each step."""
    gradient_checkpointing: Literal[False, True, "offload"] = False
    """Recompute activations in the backward pass: less memory, about a third more time. offload also keeps what they
    are recomputed from, the input of each layer, in host memory instead of on the GPU."""
    log_probs_chunk_tokens: PositiveInt = 1024
    """Tokens whose logits are in memory at once."""
    log_probs_kept_mib: NonNegativeFloat = Field(128.0, allow_inf_nan=False)
    """Keep a forward pass's log-probs [tokens learned from, vocabulary] for the backward pass if they are at most this
    large. Larger ones are recomputed there chunk by chunk, which adds a fourth matrix product to three."""

    def stage_on(self, num_ranks: int, *, is_float32: bool) -> int:
        """As for a model that does not learn; but a single rank uses ZeRO-2 in bfloat16, which keeps float32 master
        weights. In float32 the weights are their own master copy, and ZeRO-2 would copy each gradient twice, a
        twentieth of a step."""
        if self._shares(num_ranks) or self.offload_optimizer or self.swap_optimizer:
            return self.zero_stage
        return 0 if is_float32 else 2


class SftPolicySection(TrainedModelSection):
    """The policy that learns from demonstrations."""

    lr: PositiveFloat = Field(1e-5, allow_inf_nan=False)
    """Peak learning rate of AdamW."""


class TrainedRewardSection(TrainedModelSection):
    """The reward model that learns from preferences."""

    lr: PositiveFloat = Field(1e-5, allow_inf_nan=False)
    """Peak learning rate of AdamW."""


class CriticSection(TrainedModelSection):
    """The critic. Without a model of its own it starts as the reward model if there is one, else as the policy."""

    lr: PositiveFloat = Field(9e-6, allow_inf_nan=False)
    """Peak learning rate of AdamW; higher than the policy's."""


class PreferencePolicySection(TrainedModelSection):
    """The policy that learns from better and worse responses."""

    lr: PositiveFloat = Field(5e-7, allow_inf_nan=False)
    """Peak learning rate of AdamW. The losses simpo (1e-6) and orpo (8e-6) have defaults of their own."""

    def with_default_lr(self, lr: float) -> Self:
        """The same policy, with this learning rate if none was given."""
        return self if "lr" in self.model_fields_set else self.model_copy(update={"lr": lr})


class StoredReferenceSection(ModelSection):
    """The reference model of an offline method; without a model of its own, the policy before training. Its log-probs
    are computed once, before the first step, and kept on disk."""

    cache_dir: PathText | None = None
    """Folder of the stored log-probs, shared by runs; by default reference-cache in run.dir."""
