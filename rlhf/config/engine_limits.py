"""What vLLM asks of a model's sizes, stated here because importing vLLM takes ten seconds."""

from dataclasses import dataclass

from rlhf.config.model_files import ModelFacts

CPU_HEAD_SIZES = frozenset({32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512})
"""Dimensions of a head for which vLLM's attention on CPU has a kernel: those that it lists, and 48, which it computes
right. With others the first step ends in an error."""


@dataclass(frozen=True, slots=True)
class Limit:
    """Why vLLM would refuse a model."""

    setting: str
    """The setting of `rollout` to change."""
    text: str


def vllm_limit(fact: ModelFacts, tensor_parallel_size: int, *, on_cpu: bool) -> Limit | None:
    """The first limit of vLLM that a model exceeds; sizes that config.json does not give are not judged."""
    heads, kv_heads, width, parallel = fact.num_heads, fact.num_kv_heads, fact.width, tensor_parallel_size
    if heads and heads % parallel:
        return _split("attention heads", heads, parallel)
    if kv_heads and kv_heads % parallel and parallel % kv_heads:
        return _split("key-value heads", kv_heads, parallel)
    if width and width % parallel:
        return _split("intermediate dimensions", width, parallel)
    if on_cpu and fact.head_dim and fact.head_dim not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, sorted(CPU_HEAD_SIZES)))
        return Limit(
            "engine",
            f"vLLM on a CPU has no attention for heads of {fact.head_dim} dimensions, only {sizes}. Use transformers.",
        )
    return None


def _split(what: str, number: int, parallel: int) -> Limit:
    fitting = ", ".join(str(size) for size in range(1, number + 1) if number % size == 0 and size <= 64)
    return Limit("tensor_parallel_size", f"{number} {what} do not split over {parallel} GPUs. Use one of {fitting}.")
