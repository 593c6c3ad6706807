"""Flags as OpenRLHF spells them, put into this project's own, so that a familiar launch command works as it stands."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

MODELS = ("policy", "reference", "critic", "reward")
TRAINED = ("policy", "critic")


@dataclass(frozen=True, slots=True)
class Own:
    """What one of their flags sets here: `value` for a switch, what follows the flag (None) for others.

    `otherwise` are the keys for commands that have none of `keys`. `never` is what they write where nothing is asked
    for. Where no key is set, `why` says so.
    """

    keys: tuple[str, ...]
    value: str | None = None
    otherwise: tuple[str, ...] = ()
    never: str | None = None
    why: str = ""

    def keys_among(self, known: Collection[str]) -> list[str]:
        """The keys that a command has."""
        return [key for key in self.keys if key in known] or [key for key in self.otherwise if key in known]


def _each(roles: Sequence[str], key: str) -> tuple[str, ...]:
    return tuple(f"{role}.{key}" for role in roles)


def _trained(key: str, value: str | None = None) -> Own:
    """Of every model that learns: in `rm` that is the reward model."""
    return Own(_each(TRAINED, key), value, otherwise=(f"reward.{key}",))


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
    "ref_offload": Own(("reference.offload_parameters",), "true"),
    "adam_offload": _trained("offload_optimizer", "true"),
    # Rollouts
    "vllm_num_engines": Own(("rollout.num_engines",)),
    "vllm_tensor_parallel_size": Own(("rollout.tensor_parallel_size",)),
    "vllm_gpu_memory_utilization": Own(("rollout.gpu_memory_utilization",)),
    "vllm_sync_backend": Own((), why="the placement decides it: nccl between GPUs, CUDA IPC within one"),
    "vllm_enable_sleep": Own((), "", why="engines that share devices always sleep"),
    "deepspeed_enable_sleep": Own((), "", why="models make room for engines that share their devices"),
    "micro_rollout_batch_size": Own((), why="batches are cut by train.max_tokens_per_micro_batch"),
    "enforce_eager": Own(("rollout.enforce_eager",), "true"),
    "rollout_batch_size": Own(("rollout.batch_size",)),
    "n_samples_per_prompt": Own(("rollout.group_size",)),
    "prompt_max_len": Own(("rollout.max_prompt_tokens",)),
    "generate_max_len": Own(("rollout.max_response_tokens",)),
    "temperature": Own(("rollout.temperature",)),
    "top_p": Own(("rollout.top_p",)),
    # Models
    "pretrain": Own(("policy.model",), otherwise=("reward.model",)),
    "critic_pretrain": Own(("critic.model",)),
    "reward_pretrain": Own(("reward.model",)),
    "remote_rm_url": Own(("reward.url",)),
    "bf16": Own(_each(MODELS, "dtype"), "bfloat16"),
    "flash_attn": Own(_each(MODELS, "attention"), "flash_attention_2"),
    "attn_implementation": Own(_each(MODELS, "attention")),
    "zero_stage": _trained("zero_stage"),
    "lora_rank": _trained("lora.rank"),
    "lora_alpha": _trained("lora.alpha"),
    "load_in_4bit": Own(_each(MODELS, "quantization"), "nf4"),
    "gradient_checkpointing": _trained("gradient_checkpointing", "true"),
    # Learning
    "actor_learning_rate": Own(("policy.lr",)),
    "critic_learning_rate": Own(("critic.lr",)),
    "learning_rate": Own(("policy.lr",), otherwise=("reward.lr",)),
    "lr_warmup_ratio": _trained("warmup_ratio"),
    "max_norm": _trained("max_grad_norm"),
    "l2": _trained("weight_decay"),
    "train_batch_size": Own(("train.batch_size",)),
    "micro_train_batch_size": Own(("train.micro_batch_size",)),
    "num_episodes": Own(("train.num_epochs",)),
    "max_epochs": Own(("algo.num_epochs",), otherwise=("train.num_epochs",)),
    "beta": Own(("algo.loss.beta",), otherwise=("algo.beta",)),
    "init_kl_coef": Own(("algo.kl.coef",)),
    "kl_estimator": Own(("algo.kl_estimator",)),
    "use_kl_loss": Own(("algo.kl_placement",), "loss"),
    "normalize_reward": Own(("algo.normalize_rewards",), "true"),
    "gamma": Own(("algo.gamma",)),
    "lambd": Own(("algo.gae_lambda",)),
    "eps_clip": Own(("algo.clip_low", "algo.clip_high")),
    "value_clip": Own(("algo.value_clip",)),
    "entropy_loss_coef": Own(("algo.entropy_coef",)),
    "ptx_coef": Own(("algo.ptx_coef",)),
    "freezing_actor_steps": Own(("algo.critic_warmup_steps",)),
    "seed": Own(("run.seed",)),
    # Data
    "prompt_data": Own(("data.path",)),
    "dataset": Own(("data.path",)),
    "max_len": Own(("data.max_tokens",)),
    "prompt_split": Own(("data.split",)),
    "eval_dataset": Own(("data.eval_path",)),
    "input_key": Own(("data.prompt_key",)),
    "output_key": Own(("data.response_key",)),
    "chosen_key": Own(("data.chosen_key",)),
    "rejected_key": Own(("data.rejected_key",)),
    "label_key": Own(("data.label_key",)),
    "input_template": Own(("data.prompt_format",)),
    "apply_chat_template": Own(("data.template",), "chat"),
    # What is kept
    "save_path": Own(("run.dir",)),
    "save_steps": Own(("checkpoint.every_steps",), never="-1"),
    "ckpt_path": Own((), why="checkpoints lie in the run's folder"),
    "save_hf_ckpt": Own((), "", why="the last model is always saved in Hugging Face's format"),
    "max_ckpt_num": Own(("checkpoint.keep",)),
    "load_checkpoint": Own(("checkpoint.resume",), "true"),
    "eval_steps": Own(("eval.every_steps",), never="-1"),
    "logging_steps": Own((), why="every step is logged"),
    "wandb_project": Own(("log.wandb_project",)),
    # Always so here
    "packing_samples": Own((), "", why="always so"),
    "enable_prefix_caching": Own((), "", why="always so"),
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
        _, equals, text = word.partition("=")
        familiar = _familiar(word)
        keys = familiar.keys_among(known) if familiar is not None else []
        if familiar is None or (familiar.keys and not keys):
            own.append(word)
            continue
        value = familiar.value
        if value is None:
            if not equals and not waiting:
                own.append(word)
                continue
            value = text if equals else waiting.pop()
        for key in keys if value != familiar.never else ():
            written = value.replace("{}", "{prompt}") if key == "data.prompt_format" else value
            own += [f"--{key.replace('_', '-')}", written]
    return own


def without_counterpart(argv: Sequence[str]) -> list[str]:
    """Those of their flags in `argv` that set nothing here, each with the reason."""
    given = ((word.partition("=")[0], _familiar(word)) for word in argv)
    return [f"{flag} ({own.why})" for flag, own in given if own is not None and not own.keys]


def _familiar(word: str) -> Own | None:
    """What a word of a command line is, where it is a flag of theirs."""
    name = word.removeprefix("--").partition("=")[0]
    return FLAGS.get(name.replace("-", "_")) if word.startswith("--") else None
