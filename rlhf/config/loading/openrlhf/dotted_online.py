"""The flags of OpenRLHF's train_ppo_ray that its other commands do not have."""

from collections.abc import Mapping

from rlhf.config.loading.openrlhf.correction import CLIP_NOTE, OTHER_METHOD, by_level, by_type, detail
from rlhf.config.loading.openrlhf.entries import (
    Entry,
    Joint,
    Own,
    as_list,
    nothing,
    one_each,
    only,
    refused,
    switch_for_nothing,
    trained,
    whole_number,
)
from rlhf.config.loading.openrlhf.joint import (
    CRITIC_FREE,
    asynchronous,
    colocate_all,
    colocate_critic_reward,
    filter_range,
    kl_coefficient,
    kl_in_loss,
    queue_size,
    reward_bounds,
    reward_source,
)
from rlhf.config.loading.openrlhf.schedules import schedule

NO_CRITIC = "this command has no critic"
GAE = "algo.gae_lambda"
BY_TOKENS = "batches are cut by train.max_tokens_per_micro_batch"
MUON = "acts only with muon, which is not here"
NO_MUON = "models are trained by AdamW. Use adam, and a learning rate for it."
TEXT_ONLY = "models read text only. Leave it out."
USE_GRPO = "ppo learns with a critic. Run `rlhf train grpo` with the same flags."


def _critic(key: str) -> Own:
    return Own((f"critic.{key}",), why=NO_CRITIC)


def _estimator(kind: str) -> Own:
    """A method without a critic."""
    return Own(("algo.type",), kind, needs=CRITIC_FREE, refusal=USE_GRPO)


def _optimizer(theirs: str, ours: str, why: str = "") -> Mapping[str, Entry]:
    return {
        f"{theirs}.adam.lr": Own((f"{ours}.lr",), why=why),
        f"{theirs}.adam.betas": Own((f"{ours}.adam_betas",), form=as_list, words=2, why=why),
        f"{theirs}.adam.eps": Own((f"{ours}.adam_eps",), why=why),
        f"{theirs}.adam.weight_decay": Own((f"{ours}.weight_decay",), why=why),
        f"{theirs}.lr_scheduler": schedule((ours,)),
        f"{theirs}.lr_warmup_ratio": Own((f"{ours}.warmup_ratio",), why=why),
        f"{theirs}.min_lr_ratio": Own((f"{ours}.min_lr_ratio",), why=why),
        f"{theirs}.max_norm": Own((f"{ours}.max_grad_norm",), why=why),
        f"{theirs}.optim": only("adam", "AdamW always", NO_MUON),
        f"{theirs}.muon.lr": nothing(MUON),
        f"{theirs}.muon.momentum": nothing(MUON),
        f"{theirs}.muon.ns_steps": nothing(MUON),
        f"{theirs}.muon.nesterov": switch_for_nothing(MUON),
        f"{theirs}.muon.no_nesterov": switch_for_nothing(MUON),
    }


PLACEMENT: Mapping[str, Entry] = {
    "actor.num_nodes": Own(("policy.num_nodes",)),
    "actor.num_gpus_per_node": Own(("policy.num_gpus_per_node",)),
    "ref.num_nodes": Own(("reference.num_nodes",)),
    "ref.num_gpus_per_node": Own(("reference.num_gpus_per_node",)),
    "reward.num_nodes": Own(("reward.num_nodes",)),
    "reward.num_gpus_per_node": Own(("reward.num_gpus_per_node",)),
    "critic.num_nodes": _critic("num_nodes"),
    "critic.num_gpus_per_node": _critic("num_gpus_per_node"),
    "train.colocate_actor_ref": Own(("cluster.colocate",), "policy,reference"),
    "train.colocate_critic_reward": Joint(colocate_critic_reward, "`cluster.colocate` = `critic,reward`", 0),
    "train.colocate_all": Joint(
        colocate_all,
        "`cluster.colocate` = `all`; beside `--train.async_enable` all but the engines",
        0,
    ),
    "ref.offload": Own(("reference.offload_parameters",), "true"),
    "reward.offload": Own(("reward.offload_parameters",), "true"),
    "ds.enable_sleep": switch_for_nothing(
        "models free unused memory for engines on their devices; policy.swap_optimizer moves optimizer states too"
    ),
}

MODELS_OF_A_RUN: Mapping[str, Entry] = {
    "actor.model_name_or_path": Own(("policy.model",)),
    "reward.model_name_or_path": Own(("reward.model",)),
    "reward.remote_url": Joint(reward_source, "`reward.url`; of a Python file `reward.function`"),
    "critic.model_name_or_path": _critic("model"),
    "critic.save_value_network": switch_for_nothing("checkpoints hold the critic"),
    "actor.gradient_checkpointing_enable": trained("gradient_checkpointing", "true"),
    "actor.gradient_checkpointing_reentrant": switch_for_nothing("speed and memory alone"),
    "actor.aux_loss_coef": Own(("algo.router_aux_coef",), never="0"),
    "actor.freeze_visual_encoder": refused(TEXT_ONLY, words=0),
    "data.image_key": nothing("images are not read"),
    "data.max_images_per_prompt": only("0", "models read text only", TEXT_ONLY),
}

ROLLOUTS: Mapping[str, Entry] = {
    "vllm.num_engines": Own(("rollout.num_engines",)),
    "vllm.tensor_parallel_size": Own(("rollout.tensor_parallel_size",)),
    "vllm.gpu_memory_utilization": Own(("rollout.gpu_memory_utilization",)),
    "vllm.enforce_eager": Own(("rollout.enforce_eager",), "true"),
    "vllm.sync_backend": nothing("the placement decides it: nccl between GPUs, CUDA IPC within one"),
    "vllm.sync_with_ray": switch_for_nothing("the placement decides how weights travel"),
    "vllm.enable_prefix_caching": switch_for_nothing("always so"),
    "vllm.enable_sleep": switch_for_nothing("engines that share devices always sleep"),
    "rollout.batch_size": Own(("rollout.batch_size",)),
    "rollout.n_samples_per_prompt": Own(("rollout.group_size",)),
    "rollout.max_new_tokens": Own(("rollout.max_response_tokens",)),
    "rollout.temperature": Own(("rollout.temperature",)),
    "rollout.top_p": Own(("rollout.top_p",)),
    "rollout.vllm_generate_batch_size": nothing("rollout.max_lag says how far sampling runs ahead"),
    "rollout.micro_batch_size": nothing(BY_TOKENS),
    "rollout.max_tokens_per_gpu": nothing(BY_TOKENS),
    "train.dynamic_batch_enable": switch_for_nothing("always so"),
    "train.max_tokens_per_gpu": Own(("train.max_tokens_per_micro_batch",)),
    "train.async_enable": Joint(asynchronous, "`rollout.max_lag`, 1 or `--train.async_queue_size`", 0),
    "train.async_queue_size": Joint(queue_size, "read with `--train.async_enable`"),
    "train.partial_rollout_enable": switch_for_nothing(
        "always so with rollout.max_lag above 0; rollout.order: ready lets steps take what is complete first"
    ),
    "train.agent_func_path": Own(
        ("rollout.environment",),
        form=lambda keys, words: ((keys[0], f"openrlhf://{words[0]}"),),
        note="rollout.max_turns bounds its turns, which nothing else does",
    ),
    "eval.temperature": Own(("eval.temperature",)),
    "eval.n_samples_per_prompt": nothing("each held-out prompt is sampled once"),
    "ckpt.best_metric_key": nothing("no best checkpoint is kept; metrics.jsonl has every evaluation"),
}

OBJECTIVE: Mapping[str, Entry] = {
    "algo.advantage.estimator": Own(
        cases={
            "gae": Own(why="always so", needs=GAE, refusal="gae needs a critic. Run `rlhf train ppo`."),
            "group_norm": _estimator("grpo"),
            "dr_grpo": _estimator("dr-grpo"),
            "rloo": _estimator("rloo"),
            "reinforce": _estimator("reinforce++"),
            "reinforce_baseline": _estimator("reinforce++-baseline"),
        },
        refusal="no such method here. Use one of gae (`rlhf train ppo`), group_norm, dr_grpo, rloo, reinforce, "
        "reinforce_baseline (`rlhf train grpo`).",
        spoils=("algo",),
    ),
    "algo.advantage.gamma": Own(
        ("algo.gamma",),
        cases={"1": Own(("algo.gamma",), why="no reward is discounted without a critic")},
        refusal="grpo does not discount. Use 1.",
    ),
    "algo.advantage.lambd": Own(("algo.gae_lambda",), why=NO_CRITIC),
    "algo.advantage.no_std_norm": refused(
        "set algo.scale none (`rlhf train grpo`) or algo.whiten_advantages false (`rlhf train ppo`) instead.",
        words=0,
    ),
    "algo.advantage.is_correction_level": Joint(
        by_level,
        f"`algo.correction.type`: off is `none`; token is `mask`, or `truncate` with the mode clip, where {CLIP_NOTE}; "
        f"seq is refused: {OTHER_METHOD}",
    ),
    "algo.advantage.is_correction_enable": Joint(
        by_type, "of 0.10.2 to 0.11.1: `algo.correction.type`; type tis is `truncate`, icepop is `mask`", 0
    ),
    "algo.advantage.is_correction_type": Joint(detail, "read with `--algo.advantage.is_correction_enable`"),
    "algo.advantage.is_correction_mode": Joint(detail, "read with `--algo.advantage.is_correction_level`"),
    "algo.advantage.is_correction_gating": Joint(detail, "ratio; read with `--algo.advantage.is_correction_level`"),
    "algo.advantage.is_correction_threshold": Joint(
        detail, "`algo.correction.cap`, or `algo.correction.low` and `algo.correction.high`", None
    ),
    "algo.dynamic_filtering_enable": Own(
        ("algo.dynamic_sampling",), "true", refusal="ppo compares no responses to one prompt. Run `rlhf train grpo`."
    ),
    "algo.dynamic_filtering_range": Joint(filter_range, "0 1 is what happens here; others are refused", 2),
    "algo.kl.init_coef": Joint(
        kl_coefficient, "`algo.kl.coef`; without `--algo.kl.use_loss` also `algo.kl_placement` = `reward`"
    ),
    "algo.kl.target": refused(
        "it counts nats a token there, and nats a response here. Give --set algo.kl.type=adaptive and "
        "--set algo.kl.target=NATS_A_RESPONSE instead.",
        spoils=("algo.kl",),
    ),
    "algo.kl.horizon": nothing("acts only with --algo.kl.target"),
    "algo.kl.estimator": Own(("algo.kl_estimator",)),
    "algo.kl.use_loss": Joint(kl_in_loss, "`algo.kl_placement` = `loss`", 0),
    "algo.kl.unbiased_gradient": switch_for_nothing("always so"),
    "actor.eps_clip": Own(("algo.clip_low", "algo.clip_high")),
    "actor.eps_clip_low_high": Own(("algo.clip_low", "algo.clip_high"), form=one_each, words=2),
    "actor.dual_clip": Own(("algo.dual_clip",)),
    "actor.policy_loss_type": Own(
        cases={
            "ppo": Own(why="always so, unless algo.ratio or algo.loss says otherwise"),
            "gspo": Own(
                ("algo.ratio", "algo.aggregation"),
                "sequence-mean seq-mean-token-mean",
                needs=CRITIC_FREE,
                refusal=USE_GRPO,
                form=lambda keys, words: one_each(keys, words[0].split()),
            ),
        },
        refusal="must be ppo or gspo.",
    ),
    "actor.loss_agg_mode": Own(("algo.aggregation",)),
    "actor.entropy_coef": Own(("algo.entropy_coef",)),
    "critic.value_clip": Own(("algo.value_clip",), why=NO_CRITIC),
    "critic.freezing_steps": Own(("algo.critic_warmup_steps",), never="-1", why=NO_CRITIC),
    "train.num_episodes": Own(("train.num_epochs",)),
    "train.enable_ema": refused("no mean of the weights is kept. Leave it out.", words=0),
    "train.ema_beta": nothing("acts only with --train.enable_ema"),
    "reward.normalize_enable": Own(
        ("algo.normalize_rewards",), "true", refusal="only ppo normalizes rewards. Leave it out."
    ),
    "reward.clip_range": Joint(reward_bounds, "`algo.clip_rewards`, the same bound for both sides", 2),
    "reward.overlong_buffer_len": Own(
        ("algo.overlong_buffer",),
        form=whole_number,
        refusal="list a source of type overlong with this buffer under reward.sources.",
    ),
    "reward.overlong_penalty_factor": only(
        "1", "always so", "the penalty grows to 1. Use 1, or list a source of type overlong with a weight."
    ),
    "reward.stop_properly_penalty_coef": refused(
        "it scales the rewards of truncated responses. Use algo.truncated_penalty, which is subtracted from them."
    ),
}

ONLINE: Mapping[str, Entry] = {
    **PLACEMENT,
    **MODELS_OF_A_RUN,
    **ROLLOUTS,
    **OBJECTIVE,
    **_optimizer("actor", "policy"),
    **_optimizer("critic", "critic", NO_CRITIC),
}
"""Their flags without dashes, in underscores."""
