"""What the code reaches in objects of libraries, for the contracts with them (`contracts.py`)."""

from collections.abc import Mapping, Sequence

REACHED: Mapping[str, Sequence[str]] = {
    "deepspeed.module_inject.auto_ep_layer:AutoEPMoELayer": ["_is_autoep_layer", "model_family", "ep_group", "ep_size"],
    "deepspeed.moe.ep_experts:GroupedExperts": ["w1", "w2", "w3"],
    "deepspeed.moe.ep_router:TokenChoiceTopKRouter": ["gate"],
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3": ["_partition_all_parameters"],
    "vllm.v1.engine.core_client:EngineCoreClient": ["add_request", "abort_requests", "get_output", "shutdown"],
    "vllm.v1.engine.llm_engine:LLMEngine": [
        *("from_engine_args", "collective_rpc", "get_supported_tasks", "reset_prefix_cache", "sleep", "wake_up"),
        *("engine_core", "input_processor"),
    ],
    "vllm.v1.sample.sampler:Sampler": ["topk_topp_sampler"],
    "vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler": ["logprobs_mode", "forward"],
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": [
        *("sampler", "intermediate_tensors", "max_num_tokens", "model_config", "device", "get_model"),
    ],
    "vllm.model_executor.models.interfaces:SupportsPP": ["make_empty_intermediate_tensors"],
    "vllm.distributed.parallel_state:GroupCoordinator": ["is_first_rank", "world_size"],
    "vllm.v1.engine:EngineCoreOutput": [
        *("request_id", "new_token_ids", "new_logprobs", "new_prompt_logprobs_tensors", "finish_reason"),
    ],
    "vllm.v1.worker.gpu_worker:Worker": [
        *("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"),
        *("weight_transfer_engine", "model_runner", "_weight_update_active"),
    ],
}
"""Attributes and methods of classes that we use without importing these, as `module:class`."""
