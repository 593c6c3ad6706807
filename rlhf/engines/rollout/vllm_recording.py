"""vLLM's workers with a record of the experts that each token used. Imported in those workers only.

vLLM's own option for this needs its second model runner, whose sampler `vllm_core` does not replace; its capturer works
with the first one as well.
"""

import torch
from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.model_executor.layers.fused_moe.layer import MoERunner
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCapturer,
    bind_routed_experts_capturer,
)
from vllm.platforms import current_platform
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu_worker import Worker

from rlhf.engines.rollout.routing_record import ComputedRows, RoutingRecord
from rlhf.errors import RlhfError
from rlhf.types import ExpertArray

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    PlatformWorker = Worker


class RecordingWorker(PlatformWorker):  # type: ignore[misc]
    """A worker whose model's routers write their choice into a buffer, which is kept after each step. All workers of
    a stage route alike, so the first one of each stage alone keeps it."""

    _record: RoutingRecord | None = None

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the model, and bind its routers before anything is compiled or captured. Raises ValueError for a model
        without routers, or with kernels that do not say what they choose."""
        super().load_model(load_dummy_weights=load_dummy_weights)
        model = self.model_runner.get_model()
        self._capturer = RoutedExpertsCapturer(
            max_num_batched_tokens=self.vllm_config.scheduler_config.max_num_batched_tokens,
            vllm_config=self.vllm_config,
        )
        layers = sorted(module.layer_id for module in model.modules() if isinstance(module, MoERunner))
        if layers or get_pp_group().world_size == 1:  # a stage of a pipeline may have no routers
            bind_routed_experts_capturer(model, self._capturer)
        self._layers = torch.tensor(layers, device=self._capturer.device_buffer.device)

    def execute_model(self, scheduler_output: SchedulerOutput) -> object:
        """Compute a step, and record its rows."""
        output = super().execute_model(scheduler_output)
        if get_tp_group().is_first_rank:
            self._keep(scheduler_output)
        return output

    def take_routes(self, request_ids: list[str]) -> dict[str, ExpertArray] | None:
        """The experts of each request in this stage's routers, as `RoutingRecord.take`; None from other workers than
        the first of a stage."""
        return None if self._record is None else {one: self._record.take(one) for one in request_ids}

    def _keep(self, scheduler_output: SchedulerOutput) -> None:
        runner = self.model_runner
        if not scheduler_output.total_num_scheduled_tokens:
            if self._record is not None:
                self._record.forget(scheduler_output.finished_req_ids)
            return
        group = self._group()
        if self._record is None:
            self._record = RoutingRecord(
                num_blocks=runner.kv_cache_config.num_blocks,
                block_size=runner.kv_cache_config.kv_cache_groups[group].kv_cache_spec.block_size,
                num_routers=len(self._layers),
                top_k=self._capturer.shape_per_token[1],
                num_experts=self.model_config.get_num_experts(),
            )
        self._record.forget(scheduler_output.finished_req_ids)
        self._record.copy_blocks(scheduler_output.kv_cache_block_copies or ())
        batch = runner.input_batch
        computed = [
            ComputedRows(
                request_id=request_id,
                start=int(batch.num_computed_tokens_cpu[index]),
                num_rows=scheduler_output.num_scheduled_tokens[request_id],
                num_prompt_tokens=runner.requests[request_id].num_prompt_tokens,
                block_ids=runner.requests[request_id].block_ids[group],
            )
            for index, request_id in enumerate(batch.req_ids)
        ]
        rows = self._capturer.device_buffer[: sum(one.num_rows for one in computed)]
        self._record.add(computed, rows[:, self._layers].cpu().numpy())

    def _group(self) -> int:
        """The group of layers whose blocks hold every token of a request."""
        for index, group in enumerate(self.model_runner.kv_cache_config.kv_cache_groups):
            if isinstance(group.kv_cache_spec, FullAttentionSpec):
                return index
        raise RlhfError("rollout.router_replay: no layer of the model keeps keys and values of all tokens. Set false.")
