"""vLLM's in-process engine core as a decoder that `StepLoop` can step. vLLM reads its environment when it is imported,
so import this module only after that is set (`rollout_vllm.py`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from torch._C._distributed_c10d import FileStore, PrefixStore
from torch.distributed.distributed_c10d import _get_default_store
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import EngineArgs, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.config.lora import MaxLoRARanks
from vllm.envs import VLLM_RPC_BASE_PATH
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.worker.worker_base import WorkerBase

from rlhf.engines.models.adapter_names import kind_of, linear_layers
from rlhf.engines.process.open_names import unlink_open_names
from rlhf.engines.process.process_memory import peak_memory
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.rollout.step_loop import DecodeRequest, StepOutput
from rlhf.engines.weight_sync.plugin import ADAPTER_BACKENDS, ADAPTER_ID, BACKENDS, register
from rlhf.errors import ModelError
from rlhf.types import FinishReason

GIB = 1 << 30
ENDS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
"""What vLLM says of an answer that came to its end; all else it says is of one that did not (abort, error)."""


class VllmCore:
    """vLLM's in-process engine core as a `DecoderCore`; used on the loop's thread only."""

    def __init__(self, spec: EngineSpec) -> None:
        """Load `spec.model`; with `spec.adapter_rank` above 0, a weight transfer brings adapters of that rank."""
        register()
        self._adapters = (
            LoRARequest("policy", ADAPTER_ID, "brought by a weight transfer") if spec.adapter_rank else None
        )
        backends = ADAPTER_BACKENDS if spec.adapter_rank else BACKENDS
        section = spec.section
        on_cpu = spec.device == "cpu"
        self._context = self._max_model_len(spec)
        self.llm = LLMEngine.from_engine_args(
            EngineArgs(
                model=spec.model,
                dtype=spec.dtype,
                seed=spec.seed % 2**31,
                load_format="safetensors",
                max_model_len=self._context,
                max_num_seqs=section.max_num_seqs,
                # Of a prompt computed in parts, vLLM throws the first parts' tokens away and turns the request's random
                # generator back, which CPU generators cannot do: there a prompt (or an answer that goes on with new
                # weights) is computed in one step.
                enable_chunked_prefill=False if on_cpu else None,
                tensor_parallel_size=section.tensor_parallel_size,
                # In an actor of a placement group vLLM would ask Ray for processes on devices that the actor holds.
                distributed_executor_backend="mp" if section.tensor_parallel_size > 1 else None,
                gpu_memory_utilization=section.gpu_memory_utilization,
                kv_cache_memory_bytes=int(section.kv_cache_gib * GIB) if on_cpu else None,
                enforce_eager=section.enforce_eager,
                enable_sleep_mode=not on_cpu,
                logprobs_mode="processed_logprobs",
                skip_tokenizer_init=True,
                generation_config="vllm",
                disable_log_stats=True,
                weight_transfer_config=WeightTransferConfig(backend=backends[spec.sync_backend]),
                enable_lora=spec.adapter_rank > 0,
                lora_target_modules=_adaptable_layers(spec.model) if spec.adapter_rank else None,
                max_lora_rank=min(rank for rank in get_args(MaxLoRARanks) if rank >= spec.adapter_rank),
            )
        )
        if on_cpu or section.tensor_parallel_size == 1:
            self.llm.collective_rpc(_leave_meeting_place)
        _unlink_names()
        self.llm.collective_rpc(_unlink_names)
        self._tasks = self.llm.get_supported_tasks()
        self.llm.collective_rpc(_report_whole_distribution)

    @staticmethod
    def _max_model_len(spec: EngineSpec) -> int:
        """Room for the longest prompt and answer, and for the one token that scoring makes vLLM sample."""
        context = int(AutoConfig.from_pretrained(spec.model).max_position_embeddings)
        return min(context, spec.section.max_prompt_tokens + spec.section.max_response_tokens + 1)

    @property
    def _client(self) -> EngineCoreClient:
        return self.llm.engine_core

    def add(self, request_id: str, request: DecodeRequest) -> None:
        if not 0 < len(request.token_ids) < self._context:
            need = f"1 to {self._context - 1}"
            raise ModelError(f"rollout: prompt of {len(request.token_ids)} tokens, need {need}")
        sampling = request.sampling
        if sampling is None:
            params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0, detokenize=False)
        else:
            params = SamplingParams(
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=request.seed,
                stop_token_ids=list(sampling.stop_token_ids),
                ignore_eos=True,  # only the request's own stop tokens end it, as in the other engine
                logprobs=0,
                detokenize=False,
            )
        prompt = tokens_input(request.token_ids.tolist())
        inputs = self.llm.input_processor.process_inputs(
            request_id, prompt, params, self._tasks, lora_request=self._adapters
        )
        self._client.add_request(inputs)

    def abort(self, request_ids: Sequence[str]) -> None:
        self._client.abort_requests(list(request_ids))

    def step(self) -> list[StepOutput]:
        outputs = []
        for output in self._client.get_output().outputs:
            log_probs = output.new_logprobs
            prompt = output.new_prompt_logprobs_tensors
            outputs.append(
                StepOutput(
                    output.request_id,
                    output.new_token_ids,
                    [] if log_probs is None else log_probs.logprobs[:, 0].tolist(),
                    None if prompt is None else prompt.logprobs[:, 0].float().numpy(),
                    None if output.finish_reason is None else ENDS.get(str(output.finish_reason), FinishReason.ABORTED),
                )
            )
        return outputs

    def forget_old_weights(self) -> None:
        """Drop every KV block that the old weights computed, those of answers under way too."""
        self.llm.reset_prefix_cache(reset_running_requests=True)

    def install_adapters(self) -> None:
        """Compute with the adapters that the last weight transfer brought, where that is what it brings."""
        if self._adapters is not None:
            self.llm.collective_rpc(_install_adapters)

    def received_digests(self) -> list[str]:
        """What each worker received in the last update."""
        digests: list[str] = self.llm.collective_rpc(_received_digest)
        return digests

    def peak_memory(self) -> int:
        """Bytes, of the fullest worker."""
        peaks: list[int] = self.llm.collective_rpc(_peak_memory)
        return max(peaks)

    def shutdown(self) -> None:
        self._client.shutdown()


def _adaptable_layers(model: str) -> list[str]:
    """What the layers are called that adapters may stand beside. The output layer is none of them: with one beside it
    vLLM cannot score a prompt on CPU."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))  # type: ignore[no-untyped-call]
    return sorted({kind_of(name) for name in linear_layers(whole)})


def _leave_meeting_place(worker: WorkerBase) -> None:
    """Remove the file through which an engine's processes found each other, which vLLM leaves in the folder for
    temporary files. Nobody reads it again, but for NCCL, which may connect two processes at their first exchange."""
    del worker
    store = _get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if isinstance(store, FileStore):
        Path(store.path).unlink(missing_ok=True)  # type: ignore[attr-defined]


def _unlink_names(worker: WorkerBase | None = None) -> None:
    """Remove what processes of one engine found each other by, once they have: Ray ends them by force."""
    del worker
    unlink_open_names(Path(VLLM_RPC_BASE_PATH))


def _install_adapters(worker: WorkerBase) -> None:
    """Let a worker compute with the adapters that the last weight transfer brought. vLLM forgets all that it has when a
    transfer is finished, so this comes after."""
    worker.weight_transfer_engine.install()


def _received_digest(worker: WorkerBase) -> str:
    digest: str = worker.weight_transfer_engine.received
    return digest


def _peak_memory(worker: WorkerBase) -> int:
    del worker
    return peak_memory()


def _report_whole_distribution(worker: WorkerBase) -> None:
    """Make a worker's sampler report log-probs at the temperature, but before top-k and top-p."""
    sampler = worker.model_runner.sampler
    inner = sampler.topk_topp_sampler
    inner.logprobs_mode = "raw_logprobs"  # it need not compute log-probs of its own any more
    sampler.topk_topp_sampler = _WholeDistribution(inner)


class _WholeDistribution(torch.nn.Module):
    """vLLM's top-k top-p sampler, with the log-probs of the logits that it is given."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self._inner = inner

    def forward(
        self,
        logits: torch.Tensor,
        generators: dict[int, torch.Generator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = logits.log_softmax(dim=-1, dtype=torch.float32)  # first: the sampler changes the logits in place
        tokens, _ = self._inner(logits, generators, k, p)
        return tokens, log_probs
