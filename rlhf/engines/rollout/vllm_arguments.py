"""What vLLM is told of an engine: the same in each of its parts. vLLM reads the environment when it is imported, so
import this module only after the environment is set (`vllm_environment.py`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch
from pydantic import ValidationError
from transformers import AutoConfig
from vllm import EngineArgs
from vllm.config import WeightTransferConfig
from vllm.config.lora import MaxLoRARanks
from vllm.usage.usage_lib import UsageContext

from rlhf.engines.models.adapter_names import linear_layers, target_module
from rlhf.engines.models.context import context_of
from rlhf.engines.models.text_part import language_model_class
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.weight_sync.plugin import ADAPTER_BACKENDS, BACKENDS
from rlhf.errors import ModelError

GIB = 1 << 30
RECORDING_WORKER = "rlhf.engines.rollout.vllm_recording.RecordingWorker"


def engine_arguments(spec: EngineSpec) -> EngineArgs:
    """vLLM's arguments for an engine, or for one part of it."""
    backends = ADAPTER_BACKENDS if spec.adapter_rank else BACKENDS
    section = spec.section
    on_cpu = spec.device == "cpu"
    arguments = EngineArgs(
        model=spec.model,
        dtype=spec.dtype,
        seed=spec.seed % 2**31,
        load_format="safetensors",
        max_model_len=max_model_len(spec),
        max_num_seqs=section.max_num_seqs_on(spec.device),
        # With chunked prefill vLLM samples after each chunk, discards the token and rewinds the request's
        # random generator, which CPU generators do not support. So on CPU a prompt (or a response that
        # continues with new weights) is prefilled in one step.
        enable_chunked_prefill=False if on_cpu else None,
        worker_cls=RECORDING_WORKER if section.router_replay else "auto",
        tensor_parallel_size=section.tensor_parallel_size,
        pipeline_parallel_size=section.pipeline_parallel_size,
        enable_expert_parallel=section.expert_parallel,
        # Inside an actor of a placement group, vLLM would ask Ray for devices that the actor already holds.
        distributed_executor_backend="mp" if section.devices_per_engine > 1 else None,
        nnodes=section.num_nodes_per_engine,
        node_rank=spec.part.index,
        master_addr=spec.part.address,
        master_port=spec.part.port,
        gpu_memory_utilization=section.gpu_memory_utilization,
        kv_cache_memory_bytes=int(section.kv_cache_gib * GIB) if on_cpu else None,
        enforce_eager=section.enforce_eager,
        enable_sleep_mode=not on_cpu,
        logprobs_mode="processed_logprobs",
        skip_tokenizer_init=True,
        language_model_only=True,  # prompts are text, so towers for images need no memory
        generation_config="vllm",
        disable_log_stats=True,
        weight_transfer_config=WeightTransferConfig(backend=backends[spec.sync_backend]),
        enable_lora=spec.adapter_rank > 0,
        lora_target_modules=_lora_target_modules(spec.model) if spec.adapter_rank else None,
        max_lora_rank=min(rank for rank in get_args(MaxLoRARanks) if rank >= spec.adapter_rank),
    )
    if on_cpu and has_states(arguments):
        arguments.enable_prefix_caching = False  # vLLM keeps the states of a prefix only between chunks
    return arguments


def usage_context(spec: EngineSpec) -> UsageContext:
    """So that a GPU prefills as many tokens at once as in vLLM's own batch inference; by default it is 2048."""
    return UsageContext.ENGINE_CONTEXT if spec.device == "cpu" else UsageContext.LLM_CLASS


def max_model_len(spec: EngineSpec) -> int:
    """The longest prompt and response together, and the one token that vLLM samples when it scores a sequence."""
    context = context_of(AutoConfig.from_pretrained(spec.model))
    return min(context, spec.section.max_prompt_tokens + spec.section.max_response_tokens + 1)


@contextmanager
def refusing(model: str) -> Iterator[None]:
    """Raise ModelError with what vLLM says about a model or setting that it does not support."""
    refused = f"rollout: vLLM cannot serve {model}"
    try:
        yield
    except ValidationError as error:
        raise ModelError([f"{refused}: {one['msg']}" for one in error.errors()]) from None
    except (ValueError, NotImplementedError, AssertionError, KeyError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{refused}: {text}") from error


def has_states(arguments: EngineArgs) -> bool:
    """Whether some layers of the model hold a state in place of keys and values (Mamba, linear attention)."""
    model = arguments.create_model_config()
    return bool(model.is_hybrid or model.has_inner_state)


def _lora_target_modules(model: str) -> list[str]:
    """Names of the layers that may have LoRA adapters. Not the output layer: with an adapter on it vLLM cannot score a
    prompt on CPU."""
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(model)
        whole = language_model_class(config).from_config(config)  # type: ignore[no-untyped-call]
    return sorted({target_module(name) for name in linear_layers(whole)})
