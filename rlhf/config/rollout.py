"""How answers are sampled."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf.config.base import Section


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTraits:
    """What a kind of rollout engine can do. Its name is also that of the package that it needs."""

    mixes: bool
    """It can mix the logits of two models (algo.mixture)."""
    max_adapter_rank: int
    """Highest rank of LoRA adapters that it adds to a model at every token; 0: it takes merged weights only."""
    on_gpu: bool
    """It can receive weights on a GPU."""
    tensor_parallel: bool
    """One engine can be spread over several GPUs."""
    cpu_process_gib: float
    """Memory of its process on a CPU, without weights and KV cache: the libraries."""
    cpu_weight_copies: float
    """Memory of the weights on a CPU, as a multiple of their size."""


EngineName = Literal["auto", "vllm", "transformers"]
ENGINES: Mapping[str, EngineTraits] = {
    "vllm": EngineTraits(
        mixes=False,
        max_adapter_rank=512,
        on_gpu=True,
        tensor_parallel=True,
        cpu_process_gib=0.75,
        # Linear layers multiply by packed copies, and loading leaves holes between these.
        cpu_weight_copies=1.5,
    ),
    "transformers": EngineTraits(
        mixes=True,
        max_adapter_rank=0,
        on_gpu=False,
        tensor_parallel=False,
        cpu_process_gib=0.55,
        cpu_weight_copies=1.0,
    ),
}
"""The kinds of engines. auto is the first one that is installed."""


def engines_that(can: Callable[[EngineTraits], object]) -> list[str]:
    """The names of the engines that can do something."""
    return [name for name, traits in ENGINES.items() if can(traits)]


class RolloutSection(Section):
    """How answers are sampled."""

    engine: EngineName = "auto"
    """auto is vllm where it is installed, else transformers; transformers alone can mix two models (algo.mixture)."""
    num_engines: PositiveInt = 1
    """Engines that share the work."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs that one vLLM engine is spread over."""
    batch_size: PositiveInt = 64
    """Prompts sampled for one step."""
    group_size: PositiveInt = 1
    """Answers to each prompt."""
    max_prompt_tokens: PositiveInt = 512
    """Longest prompt."""
    max_response_tokens: PositiveInt = 512
    """Longest answer; one that reaches it is truncated, and counted as such."""
    temperature: float = Field(1.0, ge=0.0, le=2.0, allow_inf_nan=False)
    """Divides the logits, when sampling and when log-probs and entropy are computed; vLLM takes at most 2."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Sample from the smallest set of tokens with this probability."""
    top_k: NonNegativeInt = 0
    """Sample from the k likeliest tokens; 0 from all."""
    max_lag: NonNegativeInt = 0
    """Policy versions that rollouts may run ahead of training; 0 is strictly on-policy."""
    max_num_seqs: PositiveInt = 64
    """Answers that one engine works on at once."""
    gpu_memory_utilization: float = Field(0.85, gt=0.0, le=1.0)
    """Share of a GPU's memory that a vLLM engine may take."""
    kv_cache_gib: PositiveFloat = 1.0
    """KV cache of a vLLM engine on CPU, in GiB."""
    enforce_eager: bool = False
    """Do not compile the model or capture CUDA graphs."""
    sync_backend: Literal["auto", "gloo", "nccl", "ipc"] = "auto"
    """How weights travel: auto is gloo on CPU, ipc on a shared GPU, nccl between GPUs."""
    sync_bucket_mib: PositiveFloat = 64.0
    """Weights travel in buckets of at least one layer and about this size."""
    sync_adapters: bool = False
    """Send a policy's adapters alone, which vLLM then adds at every token, instead of weights with adapters merged: far
    less to send, and slower to sample with."""
    stall_timeout_s: PositiveFloat = 300.0
    """Longest time in which an engine that has work may finish no token."""
    generate_timeout_s: PositiveFloat = 3600.0
    """Longest time that sampling one step's answers may take."""
    sync_timeout_s: PositiveFloat = 120.0
    """Longest weight sync."""

    @property
    def expected_traits(self) -> EngineTraits:
        """What the engine can do, where nothing shows which ones are installed: auto is taken for the first."""
        return next(iter(ENGINES.values())) if self.engine == "auto" else ENGINES[self.engine]


class GroupRolloutSection(RolloutSection):
    """How groups of answers are sampled."""

    group_size: PositiveInt = 8
    """Answers to each prompt."""


class PairRolloutSection(RolloutSection):
    """How answers that are paired are sampled."""

    group_size: PositiveInt = 2
    """Answers to each prompt; the best and the worst become a pair."""
    temperature: float = Field(0.9, ge=0.0, le=2.0, allow_inf_nan=False)
    """Divides the logits, when sampling and when log-probs and entropy are computed; vLLM takes at most 2."""


class LabeledRolloutSection(RolloutSection):
    """How answers that are labeled are sampled. One step's answers are one optimizer step's."""

    batch_size: PositiveInt = 16
    """Prompts sampled for one step."""
    group_size: PositiveInt = 4
    """Answers to each prompt."""
