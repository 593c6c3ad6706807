"""Flags as OpenRLHF spells them, put into this project's own, so that a familiar launch command works as it stands."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

MODELS = ("policy", "reference", "critic", "reward")
TRAINED = ("policy", "critic")


@dataclass(frozen=True, slots=True)
class Own:
    """What one of their flags sets here: `value` for a switch, what follows the flag (None) for others."""

    keys: tuple[str, ...]
    value: str | None = None


def _each(roles: Sequence[str], key: str) -> tuple[str, ...]:
    return tuple(f"{role}.{key}" for role in roles)


FLAGS: Mapping[str, Own] = {
    # Where models live
    "actor_num_nodes": Own(("policy.num_nodes",)),
    "actor_num_gpus_per_node": Own(("policy.num_gpus_per_node",)),
    "ref_num_nodes": Own(("reference.num_nodes",)),
    "ref_num_gpus_per_node": Own(("reference.num_gpus_per_node",)),
    "reward_num_nodes": Own(("reward.num_nodes",)),
    "reward_num_gpus_per_node": Own(("reward.num_gpus_per_node",)),
    "critic_num_nodes": Own(("critic.num_nodes",)),
    "critic_num_gpus_per_node": Own(("critic.num_gpus_per_node",)),
    "colocate_actor_ref": Own(("cluster.colocate",), "policy,reference"),
    "colocate_critic_reward": Own(("cluster.colocate",), "critic,reward"),
    "colocate_all_models": Own(("cluster.colocate",), "all"),
    "ref_reward_offload": Own(("reference.offload_parameters", "reward.offload_parameters"), "true"),
    "adam_offload": Own(_each(TRAINED, "offload_optimizer"), "true"),
    # Rollouts
    "vllm_num_engines": Own(("rollout.num_engines",)),
    "vllm_tensor_parallel_size": Own(("rollout.tensor_parallel_size",)),
    "vllm_gpu_memory_utilization": Own(("rollout.gpu_memory_utilization",)),
    "vllm_sync_backend": Own(("rollout.sync_backend",)),
    "enforce_eager": Own(("rollout.enforce_eager",), "true"),
    "rollout_batch_size": Own(("rollout.batch_size",)),
    "n_samples_per_prompt": Own(("rollout.num_samples",)),
    "prompt_max_len": Own(("rollout.max_prompt_tokens",)),
    "generate_max_len": Own(("rollout.max_response_tokens",)),
    "temperature": Own(("rollout.temperature",)),
    "top_p": Own(("rollout.top_p",)),
    # Models
    "pretrain": Own(("policy.model",)),
    "critic_pretrain": Own(("critic.model",)),
    "reward_pretrain": Own(("reward.model",)),
    "bf16": Own(_each(MODELS, "dtype"), "bfloat16"),
    "flash_attn": Own(_each(MODELS, "attention"), "flash_attention_2"),
    "attn_implementation": Own(_each(MODELS, "attention")),
    "zero_stage": Own(_each(TRAINED, "zero_stage")),
    "lora_rank": Own(_each(TRAINED, "lora.rank")),
    "lora_alpha": Own(_each(TRAINED, "lora.alpha")),
    "load_in_4bit": Own(_each(MODELS, "quantization"), "nf4"),
    "gradient_checkpointing": Own(_each(TRAINED, "gradient_checkpointing"), "true"),
    # Learning
    "actor_learning_rate": Own(("policy.lr",)),
    "critic_learning_rate": Own(("critic.lr",)),
    "lr_warmup_ratio": Own(_each(TRAINED, "warmup_ratio")),
    "max_norm": Own(_each(TRAINED, "max_grad_norm")),
    "l2": Own(_each(TRAINED, "weight_decay")),
    "train_batch_size": Own(("train.batch_size",)),
    "micro_train_batch_size": Own(("train.micro_batch_size",)),
    "num_episodes": Own(("train.num_epochs",)),
    "max_epochs": Own(("algo.num_epochs",)),
    "init_kl_coef": Own(("algo.kl.coef",)),
    "normalize_reward": Own(("algo.normalize_rewards",), "true"),
    "gamma": Own(("algo.gamma",)),
    "lambd": Own(("algo.gae_lambda",)),
    "eps_clip": Own(("algo.clip_low", "algo.clip_high")),
    "value_clip": Own(("algo.value_clip",)),
    "entropy_loss_coef": Own(("algo.entropy_coef",)),
    "ptx_coef": Own(("algo.ptx_coef",)),
    "freezing_actor_steps": Own(("algo.freeze_policy_steps",)),
    "seed": Own(("run.seed",)),
    # Data
    "prompt_data": Own(("data.path",)),
    "prompt_split": Own(("data.split",)),
    "eval_dataset": Own(("data.eval_path",)),
    "input_key": Own(("data.prompt_key",)),
    "label_key": Own(("data.label_key",)),
    "input_template": Own(("data.prompt_format",)),
    "apply_chat_template": Own(("data.template",), "chat"),
    # What is kept
    "save_path": Own(("run.dir",)),
    "save_steps": Own(("checkpoint.every_steps",)),
    "max_ckpt_num": Own(("checkpoint.keep",)),
    "load_checkpoint": Own(("checkpoint.resume",), "true"),
    "eval_steps": Own(("eval.every_steps",)),
    "wandb_project": Own(("log.wandb_project",)),
    # Always so here
    "packing_samples": Own((), ""),
    "enable_prefix_caching": Own((), ""),
}
"""Theirs, in underscores, and ours."""


def in_own_flags(argv: Sequence[str], known: Collection[str]) -> list[str]:
    """`argv` with OpenRLHF's flags in this project's spelling; what is no flag of theirs stays as it is.

    `known` are the keys of the command: of the keys that a flag sets, those count that the command has. A flag none of
    whose keys it has stays as it is, to be refused with the others.
    """
    own: list[str] = []
    waiting = list(reversed(argv))
    while waiting:
        word = waiting.pop()
        name, equals, text = word.removeprefix("--").partition("=")
        familiar = FLAGS.get(name.replace("-", "_")) if word.startswith("--") else None
        keys = [key for key in familiar.keys if key in known] if familiar is not None else []
        if familiar is None or (familiar.keys and not keys):
            own.append(word)
            continue
        value = familiar.value
        if value is None:
            if not equals and not waiting:
                own.append(word)
                continue
            value = text if equals else waiting.pop()
        for key in keys:
            written = value.replace("{}", "{prompt}") if key == "data.prompt_format" else value
            own += [f"--{key.replace('_', '-')}", written]
    return own
