"""vLLM's in-process engine core as a decoder that `StepLoop` can step. vLLM reads the environment when it is imported,
so import this module only after the environment is set (`vllm_environment.py`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch._C._distributed_c10d import FileStore, PrefixStore
from torch.distributed.distributed_c10d import _get_default_store
from vllm import SamplingParams
from vllm.distributed.parallel_state import get_pp_group
from vllm.envs import VLLM_RPC_BASE_PATH
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.worker.worker_base import WorkerBase

from rlhf.engines.process.open_names import unlink_open_names
from rlhf.engines.process.process_memory import peak_memory
from rlhf.engines.rollout.seeded_sampler import SeededSampler
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.rollout.step_loop import DecodeRequest, StepOutput
from rlhf.engines.rollout.vllm_arguments import engine_arguments, max_model_len, refusing, usage_context
from rlhf.engines.weight_sync.plugin import ADAPTER_ID, register
from rlhf.errors import ModelError, WeightSyncError
from rlhf.types import ExpertArray, FinishReason

_Failure = tuple[bool, str]
"""Whether an error is a WeightSyncError, and its text."""
FINISH_REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
"""vLLM's finish reasons of complete responses; any other one (abort, error) is FinishReason.ABORTED."""


class VllmCore:
    """vLLM's in-process engine core as a `DecoderCore`; used by the loop's thread only."""

    def __init__(self, spec: EngineSpec) -> None:
        """Load `spec.model`; with `spec.adapter_rank` above 0, a weight transfer brings adapters of that rank."""
        register()
        self._adapters = (
            LoRARequest("policy", ADAPTER_ID, "brought by a weight transfer") if spec.adapter_rank else None
        )
        self._context = max_model_len(spec)
        self._keeps_kv_cache = spec.section.kv_cache == "keep"
        self._num_updates = 0
        self._records = spec.section.router_replay
        with refusing(spec.model):
            self.llm = LLMEngine.from_engine_args(engine_arguments(spec), usage_context=usage_context(spec))
        if spec.section.num_nodes_per_engine == 1 and (spec.device == "cpu" or spec.section.devices_per_engine == 1):
            self.llm.collective_rpc(_remove_rendezvous_file)
        _unlink_shared_names()
        self.llm.collective_rpc(_unlink_shared_names)
        self._tasks = self.llm.get_supported_tasks()
        self.llm.collective_rpc(_replace_sampler)
        if spec.section.pipeline_parallel_size > 1:
            self.llm.collective_rpc(_make_room_for_inputs)

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
                ignore_eos=True,  # only the request's own stop tokens end it, as in the transformers engine
                logprobs=0,
                detokenize=False,
            )
        # With another salt, a prompt shares no blocks of the prefix cache that older weights computed.
        prompt = tokens_input(request.token_ids.tolist(), cache_salt=f"update {self._num_updates}")
        inputs = self.llm.input_processor.process_inputs(
            request_id, prompt, params, self._tasks, lora_request=self._adapters
        )
        self._client.add_request(inputs)

    def abort(self, request_ids: Sequence[str]) -> None:
        self._client.abort_requests(list(request_ids))

    def step(self) -> list[StepOutput]:
        outputs = []
        stepped = self._client.get_output().outputs
        routes = self._routes([one.request_id for one in stepped if str(one.finish_reason) in FINISH_REASONS])
        for output in stepped:
            log_probs = output.new_logprobs
            prompt = output.new_prompt_logprobs_tensors
            outputs.append(
                StepOutput(
                    output.request_id,
                    output.new_token_ids,
                    [] if log_probs is None else log_probs.logprobs[:, 0].tolist(),
                    None if prompt is None else prompt.logprobs[:, 0].float().numpy(),
                    None
                    if output.finish_reason is None
                    else FINISH_REASONS.get(str(output.finish_reason), FinishReason.ABORTED),
                    routes.get(output.request_id),
                )
            )
        return outputs

    def _routes(self, request_ids: list[str]) -> dict[str, ExpertArray]:
        """The experts of requests that are complete, where they are recorded. The workers have them until the next
        step."""
        if not self._records or not request_ids:
            return {}
        found: list[dict[str, ExpertArray] | None] = self.llm.collective_rpc("take_routes", args=(request_ids,))
        stages = [one for one in found if one is not None]
        return {
            request_id: np.concatenate([stage[request_id] for stage in stages], axis=1) for request_id in request_ids
        }

    def leave_kv_cache(self) -> None:
        """Old weights computed the KV cache: no new request uses it. Running requests compute theirs again, unless
        `rollout.kv_cache` is keep."""
        self._num_updates += 1
        if not self._keeps_kv_cache:
            self.llm.reset_prefix_cache(reset_running_requests=True)

    def install_adapters(self) -> None:
        """Use the LoRA adapters of the last weight transfer, if this engine receives adapters."""
        if self._adapters is not None:
            self.llm.collective_rpc(_install_adapters)

    def transfer(self, method: str, **arguments: object) -> None:
        """Call a weight-transfer method of vLLM on all workers. Raises the first error, once all have answered: vLLM
        itself stops reading at an error, and would take the other answers for those to its next call."""
        answers: list[_Failure | None] = self.llm.collective_rpc(_attempt, args=(method, arguments))
        failures = [answer for answer in answers if answer is not None]
        if failures:
            self.llm.collective_rpc(_end_update)
            is_named, text = failures[0]
            raise WeightSyncError(text) if is_named else RuntimeError(text)

    def received_digests(self) -> list[str]:
        """The digest of what each worker received in the last update."""
        digests: list[str] = self.llm.collective_rpc(_received_digest)
        return digests

    def peak_memory(self) -> int:
        """Peak bytes of the largest worker."""
        peaks: list[int] = self.llm.collective_rpc(_peak_memory)
        return max(peaks)

    def shutdown(self) -> None:
        self._client.shutdown()


def _remove_rendezvous_file(worker: WorkerBase) -> None:
    """Remove the rendezvous file of the engine's process group, which vLLM leaves in the folder for temporary files.
    Only NCCL may read it again, when two processes first communicate."""
    del worker
    store = _get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if isinstance(store, FileStore):
        Path(store.path).unlink(missing_ok=True)  # type: ignore[attr-defined]


def _unlink_shared_names(worker: WorkerBase | None = None) -> None:
    """Remove the names of shared memory and sockets once all processes of the engine have opened them: Ray kills
    processes, and a killed process would leave the names behind."""
    del worker
    unlink_open_names(Path(VLLM_RPC_BASE_PATH))


def _attempt(worker: WorkerBase, method: str, arguments: Mapping[str, object]) -> _Failure | None:
    """Call a method of a worker. Returns what went wrong."""
    try:
        getattr(worker, method)(**arguments)
    except WeightSyncError as error:
        return True, str(error)
    except Exception as error:
        return False, repr(error)
    return None


def _end_update(worker: WorkerBase) -> None:
    """End an update that has failed in some worker: in those that received all of it, it would go on, and no other one
    could start."""
    worker._weight_update_active = False


def _install_adapters(worker: WorkerBase) -> None:
    """Make a worker use the adapters of the last weight transfer. vLLM removes all adapters when a transfer is
    finished, so this is called afterwards."""
    worker.weight_transfer_engine.install()


def _received_digest(worker: WorkerBase) -> str:
    digest: str = worker.weight_transfer_engine.received
    return digest


def _peak_memory(worker: WorkerBase) -> int:
    del worker
    return peak_memory()


def _make_room_for_inputs(worker: WorkerBase) -> None:
    """Give a later stage of a pipeline the tensors that it copies the earlier one's outputs into. vLLM makes them when
    it warms up, which it does not on a CPU without compilation."""
    runner = worker.model_runner
    if runner.intermediate_tensors is None and not get_pp_group().is_first_rank:
        runner.intermediate_tensors = runner.get_model().make_empty_intermediate_tensors(
            batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
        )


def _replace_sampler(worker: WorkerBase) -> None:
    """Make a worker's sampler report log-probs of logits / temperature, before top-k and top-p; and on a GPU, draw for
    all requests at once."""
    sampler = worker.model_runner.sampler
    inner = sampler.topk_topp_sampler
    inner.logprobs_mode = "raw_logprobs"  # so that it computes no log-probs of its own
    # On CPU vLLM's own takes one number of each request's generator.
    draw = inner if worker.model_runner.device.type == "cpu" else SeededSampler(apply_top_k_top_p)
    sampler.topk_topp_sampler = _FullDistributionSampler(draw)


class _FullDistributionSampler(torch.nn.Module):
    """vLLM's top-k and top-p sampler, with the log-probs of the logits before filtering."""

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
