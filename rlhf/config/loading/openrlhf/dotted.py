"""The flags of OpenRLHF 0.10.2 to 0.11.2: those that its four training commands share, and all of them together."""

from collections.abc import Mapping

from rlhf.config.loading.openrlhf.dotted_online import ONLINE
from rlhf.config.loading.openrlhf.dotted_supervised import SUPERVISED
from rlhf.config.loading.openrlhf.entries import (
    MODELS,
    Entry,
    Joint,
    Own,
    braces,
    each,
    item_by_item,
    nothing,
    only,
    refused,
    switch_for_nothing,
    trained,
)
from rlhf.config.loading.openrlhf.joint import max_samples, micro_batch_size, rows, split, total_length

IN_RUN_FOLDER = "checkpoints are in the run's folder"
EVERY_STEP = "every step is logged"
ALWAYS = "always so"
WHOLE_LAYERS = "models are split by ZeRO alone"
SHARED_SEQUENCES = "policy.sequence_parallel_size spreads each sequence over that many of the policy's processes"
ONLY_SPEED = "speed and memory alone"
KERNELS = ("eager", "sdpa", "flash_attention_2")

CHECKPOINTS_AND_LOGS: Mapping[str, Entry] = {
    "ckpt.output_dir": Own(("run.dir",)),
    "ckpt.save_steps": Own(("checkpoint.every_steps",), never="-1"),
    "ckpt.path": nothing(IN_RUN_FOLDER),
    "ckpt.save_hf": switch_for_nothing("the last model is always saved in Hugging Face's format"),
    "ckpt.disable_ds": switch_for_nothing("checkpoints are always saved; checkpoint.every_steps says how often"),
    "ckpt.max_num": Own(("checkpoint.keep",)),
    "ckpt.max_mem": nothing("checkpoint.keep counts checkpoints, not bytes"),
    "ckpt.load_enable": Own(("checkpoint.resume",), "true"),
    "ds.use_universal_ckpt": switch_for_nothing("a run continues from its own checkpoints"),
    "logger.logging_steps": nothing(EVERY_STEP),
    "logger.tensorboard_dir": nothing("TensorBoard files are in the run's folder"),
    "logger.wandb.key": nothing(
        "a key is read from WANDB_API_KEY in the environment alone; log.wandb_project turns the tracker on"
    ),
    "logger.wandb.project": Own(("log.wandb_project",)),
    "logger.wandb.org": nothing("export WANDB_ENTITY"),
    "logger.wandb.group": nothing("export WANDB_RUN_GROUP"),
    "logger.wandb.run_name": nothing("the run is called run.name"),
}

COMPUTING: Mapping[str, Entry] = {
    "ds.zero_stage": trained("zero_stage"),
    "ds.param_dtype": Own(
        cases={"bf16": Own(each(MODELS, "dtype"), "bfloat16")},
        refusal="models are trained in bfloat16 or float32. Use bf16, or leave it out and set policy.dtype.",
    ),
    "ds.attn_implementation": Own(
        cases={kernel: Own(each(MODELS, "attention"), kernel) for kernel in KERNELS},
        refusal=f"must be one of {', '.join(KERNELS)}. Leave it out to take the best one installed.",
    ),
    "ds.adam_offload": trained("offload_optimizer", "true"),
    "ds.load_in_4bit": Own(each(MODELS, "quantization"), "nf4"),
    "ds.lora.rank": trained("lora.rank"),
    "ds.lora.alpha": trained("lora.alpha"),
    "ds.lora.target_modules": Own(
        each(("policy", "critic"), "lora.targets"),
        otherwise=("reward.lora.targets",),
        cases={"all-linear": Own(why="without lora.targets, all linear layers get adapters")},
        form=item_by_item,
        words=None,
    ),
    "ds.lora.dropout": only("0", "adapters have no dropout", "adapters have no dropout. Use 0, or leave it out."),
    "ds.value_head_prefix": only("score", "the head is called score", "the head of a model must be called score."),
    "ds.packing_samples": switch_for_nothing(ALWAYS),
    "ds.grad_accum_dtype": only("fp32", ALWAYS, "gradients are always added up in float32. Use fp32."),
    "ds.use_liger_kernel": switch_for_nothing(ONLY_SPEED),
    "ds.deepcompile": switch_for_nothing(ONLY_SPEED),
    "ds.overlap_comm": switch_for_nothing(ONLY_SPEED),
    "ds.zpg": trained("zero_hpz_partition_size"),
    "ds.experts_implementation": nothing(ONLY_SPEED),
    "ds.tensor_parallel_size": nothing(WHOLE_LAYERS),
    "ds.ring_attn_size": nothing(SHARED_SEQUENCES),
    "ds.ring_attn_head_stride": nothing(SHARED_SEQUENCES),
    "local_rank": nothing("Ray starts the processes"),
    "use_ms": refused("models and data sets come from the Hugging Face hub or from folders. Leave it out.", words=0),
}

LEARNING: Mapping[str, Entry] = {
    "train.batch_size": Own(("train.batch_size",)),
    "train.micro_batch_size": Joint(
        micro_batch_size, "`train.micro_batch_size`; nothing beside `--train.dynamic_batch_enable`"
    ),
    "train.max_epochs": Own(("algo.num_epochs",), otherwise=("train.num_epochs",)),
    "train.seed": Own(("run.seed",)),
    "train.full_determinism_enable": switch_for_nothing("run.seed decides every random choice"),
}

ROWS: Mapping[str, Entry] = {
    "data.dataset": Joint(rows, "`data.path`, of one data set"),
    "data.prompt_dataset": Joint(rows, "`data.path`, of one data set"),
    "data.dataset_split": Joint(split, "`data.split`"),
    "data.prompt_split": Joint(split, "`data.split`"),
    "data.dataset_probs": refused("one data set is read. Mix the rows in a file."),
    "data.prompt_probs": refused("one data set is read. Mix the rows in a file."),
    "data.max_samples": Joint(
        max_samples,
        "`data.split` = `train[:N]` of a data set from the hub; refused for files, of which all rows are read",
    ),
    "data.max_len": Joint(
        total_length,
        "`data.max_tokens`; where responses are sampled `rollout.max_prompt_tokens`, which is what "
        "`--rollout.max_new_tokens` leaves, or without it half of this for the prompt and half for "
        "`rollout.max_response_tokens`",
    ),
    "data.input_key": Own(("data.prompt_key",)),
    "data.prompt_key": Own(("data.prompt_key",)),
    "data.output_key": Own(("data.response_key",)),
    "data.label_key": Own(("data.label_key",)),
    "data.chosen_key": Own(("data.chosen_key",)),
    "data.rejected_key": Own(("data.rejected_key",)),
    "data.input_template": Own(("data.prompt_format",), form=braces),
    "data.apply_chat_template": Own(("data.template",), "chat"),
    "data.tokenizer_chat_template": refused("put the template into a .jinja file and set data.chat_template to it."),
    "data.multiturn": switch_for_nothing("of messages, all of the assistant's turns are always learned"),
    "data.disable_fast_tokenizer": switch_for_nothing("the model's folder decides which tokenizer is loaded"),
    "data.dataloader_num_workers": nothing("rows are read once, at the start"),
    "eval.dataset": Own(("data.eval_path",)),
    "eval.split": Own(("data.eval_split",)),
    "eval.steps": Own(("eval.every_steps",), never="-1"),
}

DOTTED: Mapping[str, Entry] = {
    **CHECKPOINTS_AND_LOGS,
    **COMPUTING,
    **LEARNING,
    **ROWS,
    **ONLINE,
    **SUPERVISED,
}
"""Their flags without dashes, in underscores."""

ALIKE = frozenset(
    {
        "algo.kl.horizon",
        "algo.kl.target",
        "critic.min_lr_ratio",
        "critic.num_gpus_per_node",
        "critic.num_nodes",
        "data.chosen_key",
        "data.label_key",
        "data.prompt_key",
        "data.rejected_key",
        "eval.temperature",
        "reward.num_gpus_per_node",
        "reward.num_nodes",
        "rollout.batch_size",
        "rollout.temperature",
        "rollout.top_p",
        "train.batch_size",
        "train.micro_batch_size",
    }
)
"""Flags that are spelled like keys of this project. They are read as OpenRLHF's only beside one that is not."""
