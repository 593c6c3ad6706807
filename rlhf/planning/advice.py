"""Advice on a plan, each with the setting to change."""

from collections.abc import Iterator

from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.planning.edits import as_flags
from rlhf.planning.fixes import Edits
from rlhf.planning.hardware import GIB
from rlhf.planning.plan import Plan
from rlhf.terminal import counted

NEARLY_FULL = 0.92
MOSTLY_IDLE = 0.5


def advice_on(plan: Plan, config: TrainConfig, edits: Edits | None) -> list[str]:
    """One line for each fact. `edits` are settings with which a plan that does not fit would fit."""
    lines = [*shortages(plan)]
    if lines:
        fix = f"It fits with: {as_flags(edits)}" if edits else "No usual setting fixes it; use more devices."
        return [*lines, fix]
    return [*_warnings(plan, config)]


def episode_processes(config: TrainConfig) -> list[str]:
    """Where tools and environments run, and what they need beside the plan's devices; nothing of a run without."""
    if not isinstance(config, OnlineConfig) or not config.rollout.has_episodes:
        return []
    section = config.rollout
    processes = counted(section.environment_processes, "process")
    each = f", each with {processes}" if section.environment_workers else ""
    workers = counted(section.environment_workers, "worker")
    where = f"{workers} on any node{each}" if section.environment_workers else f"{processes} on the driver's node"
    memory = section.environment_memory_gib
    limit = "as much memory as they take" if memory is None else f"up to {memory:g} GiB of memory for each process"
    return [f"tools and environments run in {where}: no CPUs are reserved for them, and {limit}"]


def shortages(plan: Plan) -> Iterator[str]:
    """What the plan has too little of."""
    for group in plan.groups:
        if not group.fits:
            yield (
                f"{group.group.name} does not fit: {group.peak / GIB:.1f} GiB a device in {group.peak_phase}, "
                f"{plan.cluster.device.name} has {group.capacity / GIB:.1f}."
            )
    if plan.short_of_memory:
        yield (
            f"all processes together need {plan.peak / GIB:.1f} GiB, the machine has "
            f"{plan.cluster.capacity_gib:.1f}. Merge roles with --colocate, or take a smaller model."
        )
    if not plan.cache_tokens_suffice:
        yield (
            f"rollout: the cache has room for {plan.cache_tokens:,.0f} tokens, and one sequence may have "
            f"{plan.work.longest:,}."
        )
    if plan.short_of_host:
        yield (
            "host memory: models while they are read, or then what is offloaded and resumed or exported, need "
            f"{plan.peak_host_bytes / GIB:.0f} GiB on a node, it has {plan.cluster.host_gib_per_node:.0f}."
        )


def _warnings(plan: Plan, config: TrainConfig) -> Iterator[str]:
    for group in plan.groups:
        if group.peak > NEARLY_FULL * group.capacity:
            yield (
                f"{group.group.name} fills {group.peak / group.capacity:.0%} of its devices in {group.peak_phase}; "
                f"fragmentation may need the rest. Lower --{_knob(group.peak_phase)}."
            )
    if isinstance(config, OnlineConfig) and plan.cache_tokens < plan.cache_wanted:
        num_seqs = config.rollout.max_num_seqs_on("cpu" if plan.cluster.device.is_cpu else "cuda")
        yield (
            f"rollout: the cache has room for {plan.cache_tokens:,.0f} tokens of the {plan.cache_wanted:,.0f} that "
            f"{num_seqs} responses may need; some will wait. Lower --rollout.max-num-seqs or raise "
            f"--rollout.tensor-parallel-size."
        )
    if plan.idle_share > MOSTLY_IDLE and len(plan.groups) > 1 and not plan.cluster.device.is_cpu:
        slowest = max(plan.seconds, key=lambda phase: plan.seconds[phase])
        overlap = "" if plan.overlaps else ", or --rollout.max-lag 1, which lets rollouts run during training"
        yield f"devices idle {plan.idle_share:.0%} of the time; {slowest} takes longest. Try --suggest{overlap}."
    wasted = plan.cluster.num_devices - plan.placement.num_devices
    if wasted and not plan.cluster.device.is_cpu:
        yield f"Not used: {wasted} of {counted(plan.cluster.num_devices, 'device')}."


def _knob(phase: str) -> str:
    return "rollout.gpu-memory-utilization" if phase in ("generate", "sync") else "train.max-tokens-per-micro-batch"
