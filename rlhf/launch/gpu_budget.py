"""The GPUs of a run and the FLOPs of training on them, as far as its models and its GPUs are known."""

from collections.abc import Callable, Mapping, Sequence

from rlhf.algorithms.needs import Needs
from rlhf.config.commands import TrainConfig
from rlhf.config.models import ModelSection, TrainedModelSection
from rlhf.errors import ConfigError, ModelError
from rlhf.orchestrator.step.metrics import GpuBudget
from rlhf.planning.cluster_shape import sheet_of
from rlhf.planning.hardware import TERA
from rlhf.planning.model_shape import ModelShape
from rlhf.planning.placement import Placement
from rlhf.planning.roles import local_config_json, shapes_of
from rlhf.planning.timing import BACKWARD, FROZEN_BACKWARD
from rlhf.types import Head, Role


def gpu_budget(
    config: TrainConfig, needs: Needs, placement: Placement, gpu_kinds: Sequence[Sequence[str]], num_epochs: int
) -> GpuBudget | None:
    """The budget of a run; None on CPUs. `gpu_kinds` are the GPUs of each node, by the names that Ray gives them;
    `num_epochs` are the passes over each step's examples."""
    kinds = {kind for node in gpu_kinds for kind in node}
    if not kinds:
        return None
    return GpuBudget(
        num_gpus=placement.num_devices,
        peak_flops=_peak_flops(*kinds) if len(kinds) == 1 else None,
        training_flops=_training_flops(config, needs, num_epochs),
    )


def _peak_flops(kind: str) -> float | None:
    """Floating-point operations a second of one GPU, in bfloat16; None for an unknown kind."""
    try:
        return sheet_of(kind).tflops * TERA
    except ConfigError:
        return None


def _training_flops(config: TrainConfig, needs: Needs, num_epochs: int) -> Callable[[float], float] | None:
    """See `GpuBudget.training_flops`; None if a model's sizes are unknown."""
    try:
        shapes = shapes_of(config, needs, local_config_json)
    except ModelError:
        return None
    return training_flops(shapes, config.models, needs.trains, num_epochs)


def training_flops(
    shapes: Mapping[Role, ModelShape],
    sections: Mapping[str, ModelSection],
    trains: Mapping[Role, Head],
    num_epochs: int,
) -> Callable[[float], float]:
    """Tokens of context -> operations of the passes that learn from one token: forward and backward of each trained
    model, the backward pass at twice the forward one, or at the same cost if only adapters are trained. What gradient
    checkpointing recomputes does not count (MFU, Chowdhery et al. 2022)."""
    trained = []
    for role, head in trains.items():
        section = sections[role.value]
        has_adapter = isinstance(section, TrainedModelSection) and section.lora.rank > 0
        shape = shapes[role] if head is Head.LOG_PROBS else shapes[role].as_scorer()
        trained.append((shape, 1.0 + (FROZEN_BACKWARD if has_adapter else BACKWARD)))

    def flops(context: float) -> float:
        return num_epochs * sum(forwards * shape.flops_per_token(context) for shape, forwards in trained)

    return flops
