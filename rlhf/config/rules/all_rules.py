"""Rules between values that are each valid alone. Pure functions of the config; all of them run."""

import re
from collections.abc import Iterator

from rlhf.config.commands import RowKind, TrainConfig, method_name, method_of
from rlhf.config.models import LoraSection, ModelSection, TrainedModelSection
from rlhf.config.problems import Problem, shown
from rlhf.config.rules.expert_parallel import expert_parallel
from rlhf.config.rules.grpo import GRPO_ADVICE, GRPO_RULES
from rlhf.config.rules.kto import KTO_RULES
from rlhf.config.rules.mixture import MIXTURE_RULES
from rlhf.config.rules.narrow import Rule
from rlhf.config.rules.online import ONLINE_ADVICE, ONLINE_RULES
from rlhf.config.rules.placement import PLACEMENT_ADVICE, PLACEMENT_RULES, colocation
from rlhf.config.rules.preference import PREFERENCE_RULES

REMOTE_CODE = re.compile(r"[\w.-]+(/[\w.-]+)?@[0-9a-f]{40}")
PREFERENCE_KEYS = ("chosen_key", "rejected_key", "ranking_key", "margin_key")


def problems_of(config: TrainConfig) -> list[Problem]:
    """Every problem between the values of a config."""
    return [problem for rule in RULES for problem in rule(config)]


def advice_on(config: TrainConfig) -> list[Problem]:
    """What is allowed and probably not intended."""
    return [advice for rule in (*ONLINE_ADVICE, *GRPO_ADVICE, *PLACEMENT_ADVICE) for advice in rule(config)]


def required(config: TrainConfig) -> Iterator[Problem]:
    """Settings that every run needs."""
    if config.data.path is None:
        yield Problem(keys=("data.path",), text="missing; name a file, a folder or a hub data set.")
    trained = method_of(config).model
    if config.models[trained].model is None:
        yield Problem(keys=(f"{trained}.model",), text="missing; name the model to train, a folder or a hub name.")


def models(config: TrainConfig) -> Iterator[Problem]:
    """How models compute and learn."""
    for role, model in config.models.items():
        if model.trust_remote_code is not None and not REMOTE_CODE.fullmatch(model.trust_remote_code):
            got = shown(model.trust_remote_code)
            yield Problem(
                keys=(f"{role}.trust_remote_code",),
                text=f"need repo@commit with all 40 digits of the commit (got {got}).",
            )
        if model.offload_parameters and model.zero_stage != 3:
            yield Problem(
                keys=(f"{role}.offload_parameters", f"{role}.zero_stage"),
                text=f"needs ZeRO stage 3 (got {role}.zero_stage {model.zero_stage}).",
            )
        if model.attention == "flash_attention_2" and config.cluster.device == "cpu":
            yield Problem(
                keys=(f"{role}.attention", "cluster.device"), text="flash_attention_2 needs a GPU. Use sdpa or auto."
            )
        if model.attention == "flash_attention_2" and model.dtype == "float32":
            yield Problem(
                keys=(f"{role}.attention", f"{role}.dtype"),
                text="flash_attention_2 cannot compute in float32. Use sdpa, or dtype bfloat16.",
            )
        yield from _second_partition(role, model)
        yield from _sequence_parallel(role, model)
        if isinstance(model, TrainedModelSection):
            yield from _learning(role, model)


def _second_partition(role: str, model: ModelSection) -> Iterator[Problem]:
    size = model.zero_hpz_partition_size
    if size > 1 and model.zero_stage != 3:
        yield Problem(
            keys=(f"{role}.zero_hpz_partition_size", f"{role}.zero_stage"),
            text=f"needs ZeRO stage 3 (got {role}.zero_stage {model.zero_stage}).",
        )
    if model.num_gpus_per_node % size:
        yield Problem(
            keys=(f"{role}.zero_hpz_partition_size", f"{role}.num_gpus_per_node"),
            text=f"{model.num_gpus_per_node} processes of a node do not split into groups of {size}. Use "
            f"{model.num_gpus_per_node}, all of a node, or 1.",
        )


def _sequence_parallel(role: str, model: ModelSection) -> Iterator[Problem]:
    size = model.sequence_parallel_size
    if model.num_ranks % size:
        fitting = ", ".join(str(n) for n in range(1, model.num_ranks + 1) if model.num_ranks % n == 0)
        yield Problem(
            keys=(f"{role}.sequence_parallel_size", f"{role}.num_gpus_per_node", f"{role}.num_nodes"),
            text=f"{model.num_ranks} processes do not split into groups of {size}. Use one of {fitting}, or more "
            "processes.",
        )
    if size > 1 and model.attention == "eager":
        yield Problem(
            keys=(f"{role}.attention", f"{role}.sequence_parallel_size"),
            text="eager does not compute packed sequences on several processes. Use auto or sdpa, or "
            f"{role}.sequence_parallel_size 1.",
        )


def _adapters(role: str, model: TrainedModelSection) -> Iterator[Problem]:
    for key in () if model.lora.rank else ("alpha", "targets"):
        if getattr(model.lora, key) != getattr(LoraSection(), key):
            yield Problem(
                keys=(f"{role}.lora.{key}", f"{role}.lora.rank"),
                text=f"not used: {role}.lora.rank 0 trains the model itself, without adapters. Set that above 0.",
            )
    if model.lora.rank and model.lora.expert_targets and not model.gradient_checkpointing:
        yield Problem(
            keys=(f"{role}.lora.targets", f"{role}.gradient_checkpointing"),
            text="experts are merged with their adapters in each forward pass, and every layer would keep its merged "
            f"experts for the backward pass. Set {role}.gradient_checkpointing.",
        )
    if model.quantization != "none" and not model.lora.rank:
        yield Problem(
            keys=(f"{role}.quantization", f"{role}.lora.rank"),
            text=f"{model.quantization} holds weights that do not learn. Set {role}.lora.rank above 0, "
            "or this to none.",
        )


def _learning(role: str, model: TrainedModelSection) -> Iterator[Problem]:
    yield from _adapters(role, model)
    if not all(0.0 <= beta < 1.0 for beta in model.adam_betas):
        yield Problem(keys=(f"{role}.adam_betas",), text=f"both must be in [0, 1) (got {list(model.adam_betas)}).")
    if model.offload_optimizer and model.zero_stage == 0:
        yield Problem(
            keys=(f"{role}.offload_optimizer", f"{role}.zero_stage"),
            text=f"needs ZeRO stage 1 or higher (got {role}.zero_stage 0).",
        )
    if model.swap_optimizer and model.zero_stage != 3:
        yield Problem(
            keys=(f"{role}.swap_optimizer", f"{role}.zero_stage"),
            text=f"needs ZeRO stage 3 (got {role}.zero_stage {model.zero_stage}).",
        )
    if model.swap_optimizer and model.offload_optimizer:
        yield Problem(
            keys=(f"{role}.swap_optimizer", f"{role}.offload_optimizer"),
            text="offload_optimizer steps in host memory. Use one of them.",
        )


def routers(config: TrainConfig) -> Iterator[Problem]:
    """A loss of routers acts on routers that learn."""
    for role, model in config.models.items():
        if isinstance(model, TrainedModelSection) and model.freeze_router and config.algo.router_aux_coef:
            yield Problem(
                keys=(f"{role}.freeze_router", "algo.router_aux_coef"),
                text=f"routers that do not learn cannot be balanced (algo.router_aux_coef "
                f"{config.algo.router_aux_coef:g}). Set one of them.",
            )


def held_out(config: TrainConfig) -> Iterator[Problem]:
    """Where held-out rows come from."""
    data = config.data
    if data.eval_path is not None and data.eval_fraction > 0.0:
        yield Problem(
            keys=("data.eval_fraction", "data.eval_path"),
            text=f"{data.eval_fraction:g} is not used together with data.eval_path. Give one of them.",
        )
    if config.eval.every_steps > 0 and data.eval_path is None and data.eval_fraction == 0.0:
        yield Problem(
            keys=("eval.every_steps", "data.eval_path", "data.eval_fraction"),
            text="there are no held-out rows. Set data.eval_path or data.eval_fraction.",
        )


def columns(config: TrainConfig) -> Iterator[Problem]:
    """Column settings that the method does not read, or that contradict each other."""
    data = config.data
    if data.ranking_key is not None and (data.chosen_key is not None or data.rejected_key is not None):
        yield Problem(
            keys=("data.ranking_key", "data.chosen_key", "data.rejected_key"),
            text="a ranking already says which responses are better. Give it, or chosen_key and rejected_key.",
        )
    rows = method_of(config).rows
    unread = set() if rows in {RowKind.PREFERENCES, RowKind.LABELED} else set(PREFERENCE_KEYS)
    if rows in {RowKind.PROMPTS, RowKind.PREFERENCES}:
        unread.add("response_key")
    for key in data.model_dump(include=unread, exclude_none=True):
        yield Problem(keys=(f"data.{key}",), text=f"not read by {method_name(config)}. Remove it.")


RULES: tuple[Rule, ...] = (
    required,
    models,
    routers,
    expert_parallel,
    held_out,
    columns,
    colocation,
    *KTO_RULES,
    *PREFERENCE_RULES,
    *MIXTURE_RULES,
    *ONLINE_RULES,
    *GRPO_RULES,
    *PLACEMENT_RULES,
)
