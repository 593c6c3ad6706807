"""The flags of OpenRLHF's train_sft, train_rm and train_dpo that are not those of all its commands."""

from collections.abc import Mapping

from rlhf.config.loading.openrlhf.entries import (
    Entry,
    Own,
    as_list,
    nothing,
    only,
    refused,
    switch_for_nothing,
    trained,
)
from rlhf.config.loading.openrlhf.schedules import schedule

MUON = "acts only with muon, which is not here"
LOSS_TYPE = "algo.loss.type"

OPTIMIZER: Mapping[str, Entry] = {
    "adam.lr": trained("lr"),
    "adam.betas": trained("adam_betas", form=as_list, words=2),
    "adam.eps": trained("adam_eps"),
    "adam.weight_decay": trained("weight_decay"),
    "lr_scheduler": schedule(("policy", "critic", "reward")),
    "lr_warmup_ratio": trained("warmup_ratio"),
    "min_lr_ratio": trained("min_lr_ratio"),
    "max_norm": trained("max_grad_norm"),
    "optim": only("adam", "AdamW always", "models are trained by AdamW. Use adam, and a learning rate for it."),
    "muon.lr": nothing(MUON),
    "muon.momentum": nothing(MUON),
    "muon.ns_steps": nothing(MUON),
    "muon.nesterov": switch_for_nothing(MUON),
    "muon.no_nesterov": switch_for_nothing(MUON),
}

SUPERVISED: Mapping[str, Entry] = {
    **OPTIMIZER,
    "model.model_name_or_path": Own(("policy.model",), otherwise=("reward.model",)),
    "ref.model_name_or_path": Own(("reference.model",)),
    "model.gradient_checkpointing_enable": trained("gradient_checkpointing", "true"),
    "model.gradient_checkpointing_reentrant": switch_for_nothing("speed and memory alone"),
    "model.aux_loss_coef": Own(("algo.router_aux_coef",), never="0"),
    "model.pretrain_mode_enable": refused("sft learns responses only. Give rows with responses.", words=0),
    "model.beta": Own(("algo.loss.beta",), otherwise=("algo.beta",)),
    "model.ipo_enable": Own(
        (LOSS_TYPE,), "ipo", note="log-ratios are averaged over the tokens of a response here, and summed there"
    ),
    "model.label_smoothing": Own(
        ("algo.loss.label_noise", LOSS_TYPE),
        needs="algo.loss.label_noise",
        cases={"0": Own(why="0 asks for nothing")},
        form=lambda keys, words: ((LOSS_TYPE, "cdpo"), (keys[0], words[0])),
    ),
    "model.nll_loss_coef": Own(
        ("algo.loss.nll_coef", LOSS_TYPE),
        needs="algo.loss.nll_coef",
        cases={"0": Own(why="0 asks for nothing")},
        form=lambda keys, words: ((LOSS_TYPE, "rpo"), (keys[0], words[0])),
    ),
    "model.compute_fp32_loss_enable": switch_for_nothing("always so"),
    "model.margin_loss_enable": Own(("algo.use_margins",), "true"),
    "model.loss_type": Own(
        cases={"sigmoid": Own(why="always so"), "logexp": Own(why="always so")},
        refusal="must be sigmoid or logexp, which are the same loss.",
    ),
}
"""Their flags without dashes, in underscores."""
