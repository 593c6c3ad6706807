"""What vLLM asks of a model's sizes, stated here because importing vLLM takes ten seconds."""

from dataclasses import dataclass

from rlhf.config.model_files import ModelFacts

CPU_HEAD_SIZES = frozenset({32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512})
"""Dimensions of a head for which vLLM's attention on CPU has a kernel: those that it lists, and 48, which it computes
right. With others the first step ends in an error."""

CPU_LATENT_SIZE = 576
"""Dimensions that vLLM's attention on CPU has a kernel for where keys and values are kept compressed (DeepSeek)."""
CPU_GATED_DELTA_SIZES = frozenset({64, 128})
"""Dimensions of a head for which vLLM has a gated delta rule on CPU. Keys and values must have the same."""
UNCOMPRESSED = frozenset({"minicpm3"})
"""Families whose keys and values vLLM keeps in full nevertheless."""
ONE_STAGE = frozenset(
    {
        "Gemma3nForCausalLM",
        "Gemma3nForConditionalGeneration",
        "HrmTextForCausalLM",
        "Mamba2ForCausalLM",
        "Zamba2ForCausalLM",
    }
)
"""Architectures that vLLM does not split into the stages of a pipeline, of those that it and transformers both have."""
NO_CPU_KERNEL = "vLLM has no kernel for it on CPUs. Set it to false."
"""What is wrong with rollout.expert_parallel there."""
VOCABULARY_BLOCK = 64
"""vLLM pads the vocabulary to a multiple of this before it splits it."""


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """How a model is divided among the GPUs of an engine."""

    tensor_parallel: int = 1
    stages: int = 1
    has_whole_experts: bool = False
    """Each GPU of a stage has whole experts (rollout.expert_parallel)."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Why vLLM would refuse a model."""

    setting: str
    """The setting of `rollout` to change."""
    text: str


def vllm_limit(fact: ModelFacts, sizes: EngineSizes, *, on_cpu: bool, dtype: str) -> Limit | None:
    """The first limit of vLLM that a model in `dtype` (float32, bfloat16) exceeds; sizes that config.json does not give
    are not judged."""
    return (
        _parallel_limit(fact, sizes)
        or _stages_limit(fact, sizes.stages)
        or (_experts_limit(fact, sizes.tensor_parallel, on_cpu=on_cpu) if sizes.has_whole_experts else None)
        or (_cpu_limit(fact, dtype) if on_cpu else None)
    )


def _parallel_limit(fact: ModelFacts, sizes: EngineSizes) -> Limit | None:
    """Why the layers of a model do not split over the GPUs of a stage."""
    parallel = sizes.tensor_parallel
    kv_heads = fact.num_kv_heads
    padded = -(-(fact.vocab_size or 0) // VOCABULARY_BLOCK) * VOCABULARY_BLOCK
    if fact.num_heads and fact.num_heads % parallel:
        return _split("attention heads", fact.num_heads, parallel)
    if kv_heads and kv_heads % parallel and parallel % kv_heads:
        return _split("key-value heads", kv_heads, parallel)
    if fact.width and fact.width % parallel and not sizes.has_whole_experts:
        return _split("intermediate dimensions", fact.width, parallel)
    if padded % parallel:
        return _split(f"tokens (a vocabulary of {fact.vocab_size}, padded)", padded, parallel)
    return None


def _stages_limit(fact: ModelFacts, stages: int) -> Limit | None:
    """Why a model does not split into the stages of a pipeline."""
    if stages == 1:
        return None
    if fact.architecture in ONE_STAGE:
        return Limit("pipeline_parallel_size", f"vLLM does not split {fact.architecture} into stages. Set it to 1.")
    if fact.num_layers and fact.num_layers < stages:
        layers = f"{fact.num_layers} layers"
        return Limit("pipeline_parallel_size", f"{layers} do not make {stages} stages. Use at most {fact.num_layers}.")
    return None


def _experts_limit(fact: ModelFacts, parallel: int, *, on_cpu: bool) -> Limit | None:
    """Why the experts of a model cannot be divided among the GPUs of a stage."""
    if on_cpu:
        return Limit("expert_parallel", NO_CPU_KERNEL)
    if fact.num_layers and not fact.num_experts:
        return Limit("expert_parallel", f"{fact.folder.name} has no experts. Set it to false.")
    if fact.num_experts and fact.num_experts < parallel:
        return Limit("expert_parallel", f"{fact.num_experts} experts cannot be divided among {parallel} GPUs.")
    return None


def _cpu_limit(fact: ModelFacts, dtype: str) -> Limit | None:
    """Why vLLM on a CPU has no attention for a model."""
    if fact.has_gated_delta and dtype != "bfloat16":
        return Limit(
            "engine",
            f"vLLM on a CPU computes linear attention (gated delta rule) in bfloat16 alone, and dtype is {dtype}. Use "
            "transformers, or set dtype to bfloat16.",
        )
    delta = sorted(fact.gated_delta_sizes)
    if len(delta) > 1 or not fact.gated_delta_sizes <= CPU_GATED_DELTA_SIZES:
        found = " and ".join(map(str, delta))
        sizes = " or ".join(map(str, sorted(CPU_GATED_DELTA_SIZES)))
        missing = (
            f"linear attention (gated delta rule) for heads of {found} dimensions, only {sizes}, the same for keys and "
            "values"
        )
    elif fact.head_dim and fact.head_dim not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, sorted(CPU_HEAD_SIZES)))
        missing = f"attention for heads of {fact.head_dim} dimensions, only {sizes}"
    elif fact.latent_size is None or fact.model_type in UNCOMPRESSED:
        return None
    elif fact.has_sparse_attention:
        missing = "sparse attention (index_topk)"
    elif fact.latent_size != CPU_LATENT_SIZE:
        missing = (
            f"attention for compressed keys and values of {fact.latent_size} dimensions "
            f"(kv_lora_rank + qk_rope_head_dim), only {CPU_LATENT_SIZE}"
        )
    else:
        return None
    return Limit("engine", f"vLLM on a CPU has no {missing}. Use transformers.")


def _split(what: str, number: int, parallel: int) -> Limit:
    fitting = ", ".join(str(size) for size in range(1, number + 1) if number % size == 0 and size <= 64)
    return Limit("tensor_parallel_size", f"{number} {what} do not split over {parallel} GPUs. Use one of {fitting}.")
