"""Rules on placement that do not depend on the cluster's size."""

from collections.abc import Iterator, Mapping

from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.config.engine_limits import NO_CPU_KERNEL
from rlhf.config.models import ModelSection
from rlhf.config.problems import Problem, shown
from rlhf.config.rollout import RolloutSection, engines_that
from rlhf.config.rules.colocation import ROLES, colocated_roles, engines_misfit
from rlhf.config.rules.narrow import Rule, for_config
from rlhf.config.tools import BenchConfig

SIZES = ("tensor_parallel_size", "pipeline_parallel_size")
"""Of an engine: their product is the number of its GPUs."""
GLOO_ON_GPUS = "gloo sends from CPUs and cluster.device is cuda. Use nccl, ipc (where they share GPUs) or auto."


def colocation(config: TrainConfig | BenchConfig) -> Iterator[Problem]:
    """The --colocate flags name known roles, each once."""
    keys = ("cluster.colocate",)
    groups = colocated_roles(config.cluster.colocate)
    names = [name for group in groups for name in group]
    for name in dict.fromkeys(names):
        if name not in ROLES:
            yield Problem(keys=keys, text=f"unknown role {shown(name)} (have {', '.join(ROLES)}, or all).")
        elif names.count(name) > 1:
            yield Problem(keys=keys, text=f"{name} is named {names.count(name)} times. Name each role once.")
    for group in groups:
        if len(group) == 1:
            yield Problem(keys=keys, text=f"needs two roles or more (got {shown(group[0])}), as policy,reference.")


def merged_shapes(config: OnlineConfig) -> Iterator[Problem]:
    """Roles that share devices ask for the same devices, and engines fit on them."""
    models = dict(config.models)
    if config.reward.model is None:
        del models["reward"]
    if not config.algo.uses_reference:
        del models["reference"]
    for group in colocated_roles(config.cluster.colocate):
        roles = [role for role in group if role in models]
        for role in roles[1:]:
            first, other = models[roles[0]], models[role]
            for name in ("num_nodes", "num_gpus_per_node"):
                need, got = first.model_dump()[name], other.model_dump()[name]
                if need != got:
                    yield Problem(
                        keys=(f"{role}.{name}", f"{roles[0]}.{name}", "cluster.colocate"),
                        text=f"{got}, but {roles[0]}, which shares its devices, has {need}. Set both to the same "
                        "number.",
                    )
        yield from _second_partitions({role: models[role].zero_hpz_partition_size for role in roles})
        if "rollout" in group and roles:
            yield from _engines_fit(config.rollout, roles[0], models[roles[0]])


def _second_partitions(sizes: Mapping[str, int]) -> Iterator[Problem]:
    """DeepSpeed has one second partition for all models of a process."""
    partitioned = [role for role, size in sizes.items() if size > 1]
    for role in partitioned[1:]:
        first = partitioned[0]
        if sizes[role] != sizes[first]:
            yield Problem(
                keys=(f"{role}.zero_hpz_partition_size", f"{first}.zero_hpz_partition_size", "cluster.colocate"),
                text=f"{sizes[role]}, but {first}, which shares its devices, has {sizes[first]}. Set both to the same "
                "number, or one to 1.",
            )


def _engines_fit(rollout: RolloutSection, role: str, model: ModelSection) -> Iterator[Problem]:
    misfit = engines_misfit(
        rollout.num_engines,
        rollout.devices_per_engine,
        nodes_per_engine=rollout.num_nodes_per_engine,
        num_nodes=model.num_nodes,
        gpus_per_node=model.num_gpus_per_node,
        role=role,
    )
    if misfit is not None:
        key, text = misfit
        others = ("num_engines", *SIZES, "num_nodes_per_engine")
        theirs = (f"{role}.num_gpus_per_node", f"{role}.num_nodes")
        yield Problem(keys=(key, *(f"rollout.{other}" for other in others), *theirs), text=text)


def unfit_for_cpus(rollout: RolloutSection) -> tuple[str, str] | None:
    """The setting of engines that vLLM does not have on CPUs, and what is wrong with it; None if there is none.

    vLLM finds out which processes share a node from a node's number of devices, which is one there. Its kernel for
    experts takes their numbers in the whole model for those in its own memory, and ends the process.
    """
    nodes, processes = rollout.num_nodes_per_engine, rollout.devices_per_engine
    if 1 < nodes < processes:
        have = f"{nodes} nodes, and {processes} processes"
        return "num_nodes_per_engine", f"{have}: on CPUs vLLM has one of an engine on each. Set both to the same."
    if rollout.expert_parallel:
        return "expert_parallel", NO_CPU_KERNEL
    return None


def engine_nodes(config: OnlineConfig | BenchConfig) -> Iterator[Problem]:
    """An engine has equally many GPUs on each of its nodes, and on CPUs what vLLM has there."""
    nodes, gpus = config.rollout.num_nodes_per_engine, config.rollout.devices_per_engine
    keys = ("rollout.num_nodes_per_engine", *(f"rollout.{name}" for name in SIZES))
    if config.cluster.device == "cpu" and (unfit := unfit_for_cpus(config.rollout)) is not None:
        yield Problem(keys=(f"rollout.{unfit[0]}", *keys, "cluster.device"), text=unfit[1])
    if gpus % nodes:
        above = -(-gpus // nodes) * nodes
        yield Problem(
            keys=keys,
            text=f"{nodes} does not divide {gpus}, the GPUs of an engine on all its nodes together "
            f"({' * '.join(SIZES)}). Make that a multiple of {nodes}, as {above}.",
        )


def weight_sync(config: OnlineConfig | BenchConfig) -> Iterator[Problem]:
    """The way that weights are sent suits the devices."""
    backend, device = config.rollout.sync_backend, config.cluster.device
    shared = any({"policy", "rollout"} <= set(group) for group in colocated_roles(config.cluster.colocate))
    keys = ("rollout.sync_backend", "cluster.device", "cluster.colocate")
    if backend in {"nccl", "ipc"} and device == "cpu":
        yield Problem(keys=keys, text=f"{backend} needs GPUs and cluster.device is cpu. Use gloo or auto.")
    elif backend == "gloo" and device == "cuda":
        yield Problem(keys=keys, text=GLOO_ON_GPUS)
    elif backend == "ipc" and not shared:
        yield Problem(keys=keys, text="ipc needs policy and rollout on the same GPUs. Add --colocate policy,rollout.")
    elif backend == "nccl" and shared:
        yield Problem(
            keys=keys, text="nccl cannot send within one GPU; policy and rollout share theirs. Use ipc or auto."
        )


def adapters_sent(config: OnlineConfig | BenchConfig) -> Iterator[Problem]:
    """If only adapters are sent, the policy has some, and the engine can apply them."""
    rollout, rank = config.rollout, config.policy.lora.rank
    if not rollout.sync_adapters:
        return
    highest = rollout.expected_traits.max_adapter_rank
    others = engines_that(lambda traits: traits.max_adapter_rank)
    engine = others[0] if rollout.engine == "auto" else rollout.engine
    if not rank:
        yield Problem(
            keys=("rollout.sync_adapters", "policy.lora.rank"),
            text="the policy has no adapters. Set policy.lora.rank above 0, or this to false.",
        )
    elif rank > highest > 0:
        yield Problem(
            keys=("rollout.sync_adapters", "policy.lora.rank"),
            text=f"{engine} adds adapters up to rank {highest} (got {rank}). Set this to false.",
        )
    if config.policy.lora.expert_targets:
        yield Problem(
            keys=("rollout.sync_adapters", "policy.lora.targets"),
            text="the engines add adapters to linear layers; those of experts are merged. Set this to false.",
        )
    if config.policy.quantization != "none":
        yield Problem(
            keys=("rollout.sync_adapters", "policy.quantization"),
            text="the engines would add the adapters to weights that are not quantized to "
            f"{config.policy.quantization}. "
            "Set this to false.",
        )
    if not highest:
        yield Problem(
            keys=("rollout.sync_adapters", "rollout.engine"),
            text=f"the {engine} engine takes merged weights only. Set this to false, or rollout.engine to "
            f"{' or '.join(others)}.",
        )


def unused_roles(config: TrainConfig) -> Iterator[Problem]:
    """The --colocate flags name models that the run does not have."""
    started = set(config.models)
    if isinstance(config, OnlineConfig):
        started.add("rollout")
        if config.reward.model is None:
            started.discard("reward")
    if not config.algo.uses_reference:
        started.discard("reference")
    for group in map(tuple, (flag.split(",") for flag in config.cluster.colocate if flag != "all")):
        absent = [name for name in map(str.strip, group) if name in ROLES and name not in started]
        if absent:
            yield Problem(
                keys=("cluster.colocate",),
                text=f"this run has no {' and no '.join(absent)}, so {','.join(group)} shares no devices with it.",
            )


PLACEMENT_ADVICE: tuple[Rule, ...] = (unused_roles,)
PLACEMENT_RULES = (for_config(OnlineConfig, engine_nodes, merged_shapes, weight_sync, adapters_sent),)
