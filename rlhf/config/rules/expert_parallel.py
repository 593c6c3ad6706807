"""What DeepSpeed's AutoEP, which spreads experts over processes, does not go together with."""

from collections.abc import Iterator

from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.config.models import TrainedModelSection
from rlhf.config.problems import Problem

KEY = "expert_parallel_size"


def expert_parallel(config: TrainConfig) -> Iterator[Problem]:
    """Experts that are spread over processes."""
    for role, model in config.models.items():
        if isinstance(model, TrainedModelSection) and model.expert_parallel_size > 1:
            yield from _processes(role, model)
            yield from _conflicts(role, model)
    if isinstance(config, OnlineConfig) and config.rollout.router_replay and config.policy.expert_parallel_size > 1:
        yield Problem(
            keys=("rollout.router_replay", f"policy.{KEY}"),
            text="DeepSpeed's AutoEP brings routers of its own, which choose experts by themselves. Set it to false, "
            f"or policy.{KEY} 1.",
        )


def _processes(role: str, model: TrainedModelSection) -> Iterator[Problem]:
    if model.num_ranks % model.expert_parallel_size:
        fitting = ", ".join(str(n) for n in range(1, model.num_ranks + 1) if model.num_ranks % n == 0)
        yield Problem(
            keys=(f"{role}.{KEY}", f"{role}.num_gpus_per_node", f"{role}.num_nodes"),
            text=f"{model.num_ranks} processes do not split into groups of {model.expert_parallel_size}. Use one of "
            f"{fitting}, or more processes.",
        )


def _conflicts(role: str, model: TrainedModelSection) -> Iterator[Problem]:
    if model.zero_stage != 3:
        yield Problem(
            keys=(f"{role}.{KEY}", f"{role}.zero_stage"),
            text=f"needs ZeRO stage 3 (got {role}.zero_stage {model.zero_stage}): below it every process holds the "
            "whole model.",
        )
    if model.zero_hpz_partition_size > 1:
        yield Problem(
            keys=(f"{role}.zero_hpz_partition_size", f"{role}.{KEY}"),
            text=f"DeepSpeed holds no second copy of parameters together with its AutoEP. Set 1, or {role}.{KEY} 1.",
        )
    if model.lora.rank:
        yield Problem(
            keys=(f"{role}.lora.rank", f"{role}.{KEY}"),
            text=f"DeepSpeed cannot save experts that its AutoEP spreads and that do not learn. Set 0, or {role}.{KEY} "
            "1.",
        )
    if model.mlp_chunk_tokens:
        yield Problem(
            keys=(f"{role}.mlp_chunk_tokens", f"{role}.{KEY}"),
            text="processes have different numbers of chunks, and in each of them all wait for each other's tokens. "
            f"Set 0, or {role}.{KEY} 1.",
        )
