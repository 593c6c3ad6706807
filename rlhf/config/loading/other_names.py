"""Names that other systems have for settings of this project, for messages about unknown keys.

Each name is followed by this project's keys in order of preference: the first that a command has is suggested. `A & B`
stands for two settings that together are theirs. The names are those of TRL 1.16 (`GRPOConfig`, `DPOConfig` and the
others) and verl 0.6 (`ppo_trainer.yaml`). Flags of OpenRLHF are translated and are not here.
"""

from collections.abc import Mapping
from types import MappingProxyType

_TRAINED = ("policy", "reward")
"""The sections of a model that a command may train, the more likely one first."""


def _trained(key: str) -> tuple[str, ...]:
    return tuple(f"{section}.{key}" for section in _TRAINED)


_OPTIMIZER = {
    "learning_rate": _trained("lr"),
    "lr_scheduler_type": _trained("lr_schedule"),
    "lr_scheduler": _trained("lr_schedule"),
    "warmup_ratio": _trained("warmup_ratio"),
    "warmup_steps": _trained("warmup_ratio"),
    "lr_warmup_steps": _trained("warmup_ratio"),
    "lr_warmup_steps_ratio": _trained("warmup_ratio"),
    "weight_decay": _trained("weight_decay"),
    "adam_beta1": _trained("adam_betas"),
    "adam_beta2": _trained("adam_betas"),
    "betas": _trained("adam_betas"),
    "adam_epsilon": _trained("adam_eps"),
    "max_grad_norm": _trained("max_grad_norm"),
    "grad_clip": _trained("max_grad_norm"),
    "clip_grad": _trained("max_grad_norm"),
}

_MODEL = {
    "model_name_or_path": _trained("model"),
    "model_name": _trained("model"),
    "sft_model_path": ("policy.model",),
    "reward_model_path": ("reward.model",),
    "ref_model": ("reference.model",),
    "torch_dtype": _trained("dtype"),
    "bf16": _trained("dtype"),
    "fp16": _trained("dtype"),
    "attn_implementation": _trained("attention"),
    "load_in_4bit": _trained("quantization"),
    "use_peft": _trained("lora.rank"),
    "lora_r": _trained("lora.rank"),
    "lora_rank": _trained("lora.rank"),
    "lora_alpha": _trained("lora.alpha"),
    "cast_lm_head_to_fp32": _trained("float32_head"),
    "lora_target_modules": _trained("lora.targets"),
    "target_modules": _trained("lora.targets"),
    "enable_gradient_checkpointing": _trained("gradient_checkpointing"),
    "enable_activation_offload": _trained("gradient_checkpointing"),
    "activation_offloading": _trained("gradient_checkpointing"),
    "tiled_mlp": _trained("mlp_chunk_tokens"),
    "param_offload": _trained("offload_parameters"),
    "optimizer_offload": _trained("offload_optimizer"),
    "cpu_offload": _trained("offload_optimizer"),
    "deepspeed": _trained("zero_stage"),
    "fsdp": _trained("zero_stage"),
}

_SAMPLING = {
    "num_generations": ("rollout.group_size",),
    "num_samples_per_prompt": ("rollout.group_size", "num_samples"),
    "num_return_sequences": ("rollout.group_size", "num_samples"),
    "max_completion_length": ("rollout.max_response_tokens", "max_tokens"),
    "max_response_length": ("rollout.max_response_tokens", "max_tokens"),
    "max_new_tokens": ("rollout.max_response_tokens", "max_tokens"),
    "response_length": ("rollout.max_response_tokens", "max_tokens"),
    "max_prompt_length": ("rollout.max_prompt_tokens",),
    "temperature": ("rollout.temperature",),
    "top_p": ("rollout.top_p",),
    "top_k": ("rollout.top_k",),
    "use_vllm": ("rollout.engine",),
    "vllm_mode": ("cluster.colocate",),
    "vllm_gpu_memory_utilization": ("rollout.gpu_memory_utilization",),
    "vllm_tensor_parallel_size": ("rollout.tensor_parallel_size",),
    "tensor_model_parallel_size": ("rollout.tensor_parallel_size",),
    "vllm_data_parallel_size": ("rollout.num_engines",),
    "data_parallel_size": ("rollout.num_engines",),
    "expert_parallel_size": ("rollout.expert_parallel",),
    "enable_expert_parallel": ("rollout.expert_parallel",),
    "vllm_enable_expert_parallel": ("rollout.expert_parallel",),
    "distributed_executor_backend": ("rollout.num_nodes_per_engine",),
    "router_replay": ("rollout.router_replay",),
    "enable_rollout_routing_replay": ("rollout.router_replay",),
    "use_rollout_routing_replay": ("rollout.router_replay",),
    "use_routing_replay": ("rollout.router_replay",),
    "enable_return_routed_experts": ("rollout.router_replay",),
    "moe_enable_routing_replay": ("rollout.router_replay",),
}

_LOSS = {
    "beta": ("algo.loss.beta", "algo.beta", "algo.kl.coef"),
    "kl_coef": ("algo.kl.coef",),
    "init_kl_coef": ("algo.kl.coef",),
    "kl_loss_coef": ("algo.kl.coef",),
    "kl_penalty_coef": ("algo.kl.coef",),
    "kl_loss_type": ("algo.kl_estimator",),
    "use_kl_loss": ("algo.kl_placement",),
    "use_kl_in_reward": ("algo.kl_placement",),
    "epsilon": ("algo.clip_low & algo.clip_high",),
    "clip_ratio": ("algo.clip_low & algo.clip_high",),
    "cliprange": ("algo.clip_low & algo.clip_high",),
    "clip_range": ("algo.clip_low & algo.clip_high",),
    "clip_eps": ("algo.clip_low & algo.clip_high",),
    "epsilon_low": ("algo.clip_low",),
    "clip_ratio_low": ("algo.clip_low",),
    "epsilon_high": ("algo.clip_high",),
    "clip_ratio_high": ("algo.clip_high",),
    "clip_ratio_c": ("algo.dual_clip",),
    "delta": ("algo.loss.delta", "algo.dual_clip"),
    "cliprange_value": ("algo.value_clip",),
    "loss_type": ("algo.loss.type", "algo.aggregation"),
    "loss_agg_mode": ("algo.aggregation",),
    "label_smoothing": ("algo.loss.label_noise",),
    "router_aux_loss_coef": ("algo.router_aux_coef",),
    "entropy_coeff": ("algo.entropy_coef",),
    "num_iterations": ("algo.num_epochs",),
    "num_ppo_epochs": ("algo.num_epochs",),
    "ppo_epochs": ("algo.num_epochs",),
    "lam": ("algo.gae_lambda",),
    "scale_rewards": ("algo.scale",),
    "norm_adv_by_std_in_grpo": ("algo.scale",),
    "importance_sampling_level": ("algo.ratio",),
    "mask_truncated_completions": ("algo.truncated",),
    "missing_eos_penalty": ("algo.truncated_penalty",),
    "adv_estimator": ("algo.type",),
    "algorithm": ("algo.type",),
}

_STEPS = {
    "per_device_train_batch_size": ("train.batch_size",),
    "gradient_accumulation_steps": ("train.batch_size",),
    "ppo_mini_batch_size": ("train.batch_size",),
    "train_batch_size": ("rollout.batch_size", "train.batch_size"),
    "steps_per_generation": ("rollout.batch_size",),
    "ppo_micro_batch_size_per_gpu": ("train.micro_batch_size",),
    "ppo_max_token_len_per_gpu": ("train.max_tokens_per_micro_batch",),
    "num_train_epochs": ("train.num_epochs",),
    "total_epochs": ("train.num_epochs",),
    "epochs": ("train.num_epochs",),
    "max_steps": ("train.num_steps",),
    "total_training_steps": ("train.num_steps",),
    "steps": ("train.num_steps",),
}

_DATA = {
    "max_length": ("data.max_tokens",),
    "max_seq_length": ("data.max_tokens",),
    "max_seq_len": ("data.max_tokens",),
    "dataset_name": ("data.path",),
    "dataset": ("data.path",),
    "train_file": ("data.path",),
    "train_files": ("data.path",),
    "val_files": ("data.eval_path",),
    "eval_dataset": ("data.eval_path",),
    "dataset_train_split": ("data.split",),
    "dataset_config": ("data.subset",),
    "shuffle_dataset": ("data.shuffle",),
    "truncation": ("data.overlong",),
    "filter_overlong_prompts": ("data.overlong",),
    "chat_template_path": ("data.chat_template",),
    "reward_funcs": ("reward.function",),
    "reward_func": ("reward.function",),
    "reward_fn": ("reward.function",),
    "reward_weights": ("reward.sources",),
}

_RUN = {
    "output_dir": ("run.dir",),
    "default_local_dir": ("run.dir",),
    "experiment_name": ("run.name",),
    "project_name": ("log.wandb_project",),
    "project": ("log.wandb_project",),
    "report_to": ("log.wandb_project",),
    "logger": ("log.wandb_project",),
    "eval_strategy": ("eval.every_steps",),
    "eval_steps": ("eval.every_steps",),
    "test_freq": ("eval.every_steps",),
    "save_strategy": ("checkpoint.every_steps",),
    "save_steps": ("checkpoint.every_steps",),
    "save_freq": ("checkpoint.every_steps",),
    "save_total_limit": ("checkpoint.keep",),
    "max_actor_ckpt_to_keep": ("checkpoint.keep",),
    "resume_from_checkpoint": ("checkpoint.resume",),
    "resume_mode": ("checkpoint.resume",),
    "n_gpus_per_node": _trained("num_gpus_per_node"),
    "nnodes": _trained("num_nodes"),
    "ulysses_sequence_parallel_size": _trained("sequence_parallel_size"),
    "expert_model_parallel_size": _trained("expert_parallel_size"),
}

BY_LAST_PART: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {**_OPTIMIZER, **_MODEL, **_SAMPLING, **_LOSS, **_STEPS, **_DATA, **_RUN}
)
"""Names whose section does not matter: TRL has none, and in verl the last part says what is meant."""

BY_WHOLE_NAME: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "actor_rollout_ref.model.path": ("policy.model",),
        "actor_rollout_ref.actor.optim.lr": ("policy.lr",),
        "actor_rollout_ref.ref.fsdp_config.param_offload": ("reference.offload_parameters",),
        "actor_rollout_ref.rollout.n": ("rollout.group_size",),
        "actor_rollout_ref.rollout.name": ("rollout.engine",),
        "actor_rollout_ref.rollout.pipeline_model_parallel_size": ("rollout.pipeline_parallel_size",),
        "actor_rollout_ref.actor.router_replay.mode": ("rollout.router_replay",),
        "policy.router_replay.enabled": ("rollout.router_replay",),
        "algorithm.kl_ctrl.type": ("algo.kl.type",),
        "algorithm.filter_groups.enable": ("algo.dynamic_sampling",),
        "critic.optim.lr": ("critic.lr",),
        "critic.model.path": ("critic.model",),
        "reward_model.model.path": ("reward.model",),
        "custom_reward_function.path": ("reward.function",),
        "custom_reward_function.name": ("reward.function",),
    }
)
"""Names that mean something by their section only."""

SECTIONS: Mapping[str, str] = MappingProxyType(
    {
        "actor": "policy",
        "actor_rollout_ref": "policy",
        "ref": "reference",
        "reward_model": "reward",
        "generation": "rollout",
        "vllm": "rollout",
        "sampling": "rollout",
        "dataset": "data",
        "training": "train",
        "trainer": "train",
        "algorithm": "algo",
        "logging": "log",
        "ckpt": "checkpoint",
        "ray": "cluster",
        "optim": "policy",
        "optimizer": "policy",
    }
)
"""Names of sections."""

SEVERAL_ENGINES = "engines do not depend on each other: several of them are data parallelism"
NOTES: Mapping[str, str] = MappingProxyType(
    {
        "eval_strategy": "a number of steps",
        "save_strategy": "a number of steps",
        "deepspeed": "its value is the ZeRO stage",
        "fsdp": "its value is the ZeRO stage",
        "per_device_train_batch_size": "it counts the examples of one optimizer step over all ranks",
        "gradient_accumulation_steps": "it counts the examples of one optimizer step over all ranks",
        "ppo_mini_batch_size": "it counts responses, not prompts",
        "warmup_steps": "a share of all steps",
        "lr_warmup_steps": "a share of all steps",
        "adam_beta1": "a list of both",
        "adam_beta2": "a list of both",
        "bf16": "its value is auto, bfloat16 or float32",
        "fp16": "its value is auto, bfloat16 or float32",
        "load_in_4bit": "its value is nf4",
        "use_peft": "adapters are trained where it is above 0",
        "use_vllm": "its value is auto, vllm or transformers",
        "data_parallel_size": SEVERAL_ENGINES,
        "vllm_data_parallel_size": SEVERAL_ENGINES,
        "expert_parallel_size": "its value is true or false, and experts are divided among tensor_parallel_size GPUs",
        "distributed_executor_backend": "an engine over several nodes has vLLM's own processes (mp) on each",
        "vllm_mode": "its value is policy,rollout for what TRL calls colocate",
        "use_kl_loss": "its value is loss",
        "use_kl_in_reward": "its value is reward",
        "mask_truncated_completions": "its value is mask",
    }
)
"""What to know before a value of theirs is written for the key that is suggested."""

_PACKED = "Rows are always packed; train.max_tokens_per_micro_batch says how far."
_ASSISTANT = "Only the assistant's tokens are learned from; all of them in rows with only a text."
WITHOUT_A_SETTING: Mapping[str, str] = MappingProxyType(
    {
        "packing": _PACKED,
        "padding_free": _PACKED,
        "use_remove_padding": _PACKED,
        "use_dynamic_bsz": _PACKED,
        "assistant_only_loss": _ASSISTANT,
        "completion_only_loss": _ASSISTANT,
        "dataset_text_field": "The column text is read where there is no prompt column.",
        "precompute_ref_log_probs": "Log-probs of a reference that does not change are always computed once.",
        "logging_steps": "Every step is logged.",
        "push_to_hub": "The model is written to the run's folder; upload it from there.",
    }
)
"""What they set and what always is so here."""
