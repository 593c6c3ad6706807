"""How answers are sampled."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf.config.base import Section


class RolloutSection(Section):
    """How answers are sampled."""

    engine: Literal["auto", "vllm", "transformers"] = "auto"
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
