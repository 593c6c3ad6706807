"""The flags of OpenRLHF's releases before 0.10.2, which have no dots."""

from collections.abc import Mapping

from rlhf.config.loading.openrlhf.dotted import DOTTED
from rlhf.config.loading.openrlhf.entries import MODELS, Entry, Own, each, only, refused, switch_for_nothing, trained
from rlhf.config.loading.openrlhf.flat_names import DOTTED_NAMES

UNCHANGED: Mapping[str, Entry] = {name: DOTTED[dotted] for name, dotted in DOTTED_NAMES.items()}
"""Flags whose meaning is that of a dotted one."""

REMOVED: Mapping[str, Entry] = {
    "ref_reward_offload": Own(("reference.offload_parameters", "reward.offload_parameters"), "true"),
    "actor_init_on_gpu": switch_for_nothing("models are always loaded where they are used"),
    "prompt_max_len": Own(("rollout.max_prompt_tokens",)),
    "generate_max_len": Own(("rollout.max_response_tokens",)),
    "pretrain": Own(("policy.model",), otherwise=("reward.model",)),
    "bf16": Own(each(MODELS, "dtype"), "bfloat16"),
    "flash_attn": Own(each(MODELS, "attention"), "flash_attention_2"),
    "attn_implementation": Own(each(MODELS, "attention")),
    "learning_rate": Own(("policy.lr",), otherwise=("reward.lr",)),
    "lr_warmup_ratio": trained("warmup_ratio"),
    "max_norm": trained("max_grad_norm"),
    "torch_compile": switch_for_nothing("speed and memory alone"),
    "use_kl_estimator_k3": Own(("algo.kl_estimator",), "k3"),
    "universal_ckpt": switch_for_nothing("a run continues from its own checkpoints"),
    "use_icepop": refused(
        "give --enable_vllm_is_correction and --vllm_is_correction_type icepop, as later releases have it.", words=0
    ),
    "ptx_coef": Own(("algo.ptx_coef",)),
    "pretrain_data": Own(("algo.ptx_path",)),
    "pretrain_data_probs": refused("one data set of texts is read. Mix the rows in a file."),
    "pretrain_split": only("train", "always so", "the split train is read. Use train, or name a file."),
    "perf": switch_for_nothing("the times of every step are always logged"),
}
"""Flags that the dotted releases have no longer, or that have several names there."""

FLAT: Mapping[str, Entry] = {**UNCHANGED, **REMOVED}
"""Their flags without dashes, in underscores."""
