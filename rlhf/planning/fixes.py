"""The nearest settings with which a run fits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.config.models import TrainedModelSection
from rlhf.errors import ConfigError
from rlhf.planning.edits import changes, edited
from rlhf.planning.plan import Plan

Planner = Callable[[TrainConfig], Plan]
Edits = Mapping[str, object]
MAX_DOUBLINGS = 6
SEQUENCE_PARALLEL = (2, 4, 8)
MLP_CHUNK_TOKENS = 4096
MERGES = (("policy,reference",), ("policy,reference", "critic,reward"), ("policy,reference,critic,reward",), ("all",))


def suggest_fixes(config: TrainConfig, planner: Planner) -> Edits | None:
    """The fewest of the usual edits, cheapest first, with which the plan fits; None if no combination suffices.

    First each edit alone, then all edits so far together. Raises nothing: an edit that cannot be placed is skipped.
    """
    ladder = [*_edits(config)]
    for edit in ladder:
        if fitting(config, edit, planner) is not None:
            return _needed(config, edit, planner)
    together: dict[str, object] = {}
    for edit in ladder:
        candidate = together | dict(edit)
        if _can_be_placed(config, candidate, planner):
            together = candidate
        if fitting(config, together, planner) is not None:
            return _needed(config, together, planner)
    return None


def _needed(config: TrainConfig, edits: Edits, planner: Planner) -> Edits:
    """The edits without those that the plan also fits without."""
    needed = dict(edits)
    for key in edits:
        fewer = {other: value for other, value in needed.items() if other != key}
        if fitting(config, fewer, planner) is not None:
            needed = fewer
    return needed


def savings(config: TrainConfig) -> dict[str, object]:
    """Everything that saves memory at the cost of a little time, in one edit, without what is set already."""
    values: dict[str, object] = {
        f"{name}.gradient_checkpointing": model.gradient_checkpointing or True
        for name, model in config.models.items()
        if isinstance(model, TrainedModelSection)
    }
    values |= {f"{name}.zero_stage": 3 for name in config.models}
    values["train.max_tokens_per_micro_batch"] = min(config.train.max_tokens_per_micro_batch, config.longest_sequence)
    return changes(config, values)


def _edits(config: TrainConfig) -> Iterator[Edits]:
    """Single edits: first those that cost a little time, then more devices, then those that cost much time."""
    if isinstance(config, OnlineConfig):
        for share in (0.7, 0.5, 0.3):
            if share < config.rollout.gpu_memory_utilization:
                yield {"rollout.gpu_memory_utilization": share}
    cheap = savings(config)
    for kind in ("gradient_checkpointing", "max_tokens_per_micro_batch", "zero_stage"):
        if edit := {key: value for key, value in cheap.items() if key.endswith(kind)}:
            yield edit
    trained = [name for name, model in config.models.items() if isinstance(model, TrainedModelSection)]
    if swapped := changes(config, {f"{name}.swap_optimizer": True for name in trained}):
        yield swapped | changes(config, {f"{name}.zero_stage": 3 for name in trained})
    if isinstance(config, OnlineConfig):
        for factor in (2, 4, 8):
            yield {"rollout.tensor_parallel_size": config.rollout.tensor_parallel_size * factor}
        for nodes, factor in product((2, 4), (1, 2, 4, 8)):
            yield _over_nodes(config, nodes, factor)
    yield from _more_devices(config)
    yield from _fewer_activations(config, trained)
    if kept := changes(config, {f"{name}.offload_optimizer": True for name in trained}):
        yield (
            kept
            | {f"{name}.swap_optimizer": False for name in trained}
            | {f"{name}.zero_stage": 3 for name in trained if config.models[name].zero_stage == 0}
        )


def _over_nodes(config: OnlineConfig, nodes: int, factor: int) -> Edits:
    """Engines that are spread over more nodes, with `factor` times as many GPUs on each."""
    rollout = config.rollout
    return {
        "rollout.tensor_parallel_size": rollout.tensor_parallel_size * factor * nodes,
        "rollout.num_nodes_per_engine": rollout.num_nodes_per_engine * nodes,
    }


def _more_devices(config: TrainConfig) -> Iterator[Edits]:
    """More devices for each model; then, where long sequences are what does not fit, several for each of them."""
    for key in ("num_gpus_per_node", "num_nodes"):
        for doubling in range(1, MAX_DOUBLINGS):
            sizes = {name: dict(model)[key] * 2**doubling for name, model in config.models.items()}
            yield {f"{name}.{key}": size for name, size in sizes.items()}
    for size in SEQUENCE_PARALLEL:
        if shared := _shared(config, size):
            yield shared


def _fewer_activations(config: TrainConfig, trained: Sequence[str]) -> Iterator[Edits]:
    """What a long sequence takes of a device, beside gradient checkpointing."""
    whole = [name for name, model in config.models.items() if not model.mlp_chunk_tokens]
    if whole:
        yield {f"{name}.mlp_chunk_tokens": MLP_CHUNK_TOKENS for name in whole}
    if edit := changes(config, {f"{name}.gradient_checkpointing": "offload" for name in trained}):
        yield edit


def _shared(config: TrainConfig, size: int) -> dict[str, object]:
    """Edits after which `size` processes of each model compute each micro-batch together, on more GPUs if need be."""
    values: dict[str, object] = {}
    for name, model in config.models.items():
        if model.sequence_parallel_size < size:
            values[f"{name}.sequence_parallel_size"] = size
            values[f"{name}.num_gpus_per_node"] = -(-model.num_gpus_per_node // size) * size
    return values


def fitting(config: TrainConfig, edits: Edits, planner: Planner) -> Plan | None:
    """The plan of the edited config, if it can be placed and fits; else None."""
    try:
        plan = planner(edited(config, edits))
    except ConfigError:
        return None
    return plan if plan.fits else None


def _can_be_placed(config: TrainConfig, edit: Edits, planner: Planner) -> bool:
    try:
        planner(edited(config, edit))
    except ConfigError:
        return False
    return True


def suggest_placement_fixes(config: TrainConfig, planner: Planner) -> Edits | None:
    """The nearest settings that can be placed on the nodes, whether or not the memory suffices: first merged roles,
    then fewer devices; None if there are none."""
    merged: list[dict[str, object]] = [{"cluster.colocate": groups} for groups in MERGES if config.is_online]
    for edit in merged:
        if _can_be_placed(config, edit, planner):
            return edit
    largest = max(max(model.num_nodes, model.num_gpus_per_node) for model in config.models.values())
    for halving in range(1, largest.bit_length() + 1):
        fewer: dict[str, object] = {}
        for name, model in config.models.items():
            fewer[f"{name}.num_gpus_per_node"] = max(1, model.num_gpus_per_node >> halving)
        if isinstance(config, OnlineConfig):
            fewer["rollout.num_engines"] = max(1, config.rollout.num_engines >> halving)
            nodes = config.rollout.num_nodes_per_engine
            on_each = config.rollout.devices_per_engine // nodes
            fewer["rollout.tensor_parallel_size"] = nodes * max(1, on_each >> halving // 2)
            fewer["rollout.pipeline_parallel_size"] = 1
        for colocate in ({}, *merged):
            if _can_be_placed(config, fewer | colocate, planner):
                return changes(config, fewer | colocate)
    return None
