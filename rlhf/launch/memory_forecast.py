"""How much memory a run is expected to need, shown before its models are loaded."""

import shutil
from pathlib import Path

from rlhf.actors.cluster import Cluster
from rlhf.algorithms.needs import Needs
from rlhf.config.commands import TrainConfig
from rlhf.errors import ConfigError, ModelError
from rlhf.planning.advice import shortages
from rlhf.planning.cluster_shape import shape_of
from rlhf.planning.hardware import GIB, LEAST_SHARED_MEMORY_GIB
from rlhf.planning.plan import Plan
from rlhf.planning.planner import plan_run
from rlhf.planning.roles import local_config_json, place, shapes_of

SHARED_MEMORY = Path("/dev/shm")


def memory_forecast(config: TrainConfig, needs: Needs, cluster: Cluster) -> list[str]:
    """A line for each group of devices, and warnings about what will probably not fit. Without a plan (a device or
    model of an unknown kind), only warnings about this machine's shared memory."""
    try:
        placement = place(config, needs)
        shape = shape_of(cluster.gpu_kinds if cluster.device == "cuda" else [], placement)
        plan = plan_run(config, needs, shapes_of(config, needs, local_config_json), shape)
    except (ConfigError, ModelError):
        return scarce_shared_memory()
    short = (f"warning: {line} Run `rlhf plan` to see what would fit." for line in shortages(plan))
    return [*_expected(plan), *short, *scarce_shared_memory()]


def scarce_shared_memory() -> list[str]:
    """A warning if this machine has so little shared memory that Ray's objects will be spilled to disk."""
    if not SHARED_MEMORY.is_dir():
        return []
    free = shutil.disk_usage(SHARED_MEMORY).free / GIB
    if free >= LEAST_SHARED_MEMORY_GIB:
        return []
    return [
        f"warning: {free:.2f} GiB free in {SHARED_MEMORY}: Ray will spill objects to disk. "
        "Delete files there, or start the container with a larger --shm-size."
    ]


def _expected(plan: Plan) -> list[str]:
    return [f"memory: {name} up to about {size / GIB:.1f} GiB a process" for name, size in plan.processes.items()]
