"""What a run is expected to hold, said before its models are loaded."""

from rlhf.actors.cluster import Cluster
from rlhf.algorithms.base import Needs
from rlhf.cli.cluster_at_hand import shape_of
from rlhf.cli.plan import local_config_json, shapes_of
from rlhf.config.commands import TrainConfig
from rlhf.errors import ConfigError, ModelError
from rlhf.planning.advice import shortages
from rlhf.planning.hardware import GIB
from rlhf.planning.plan import Plan, plan_run
from rlhf.planning.roles import place


def foreseen(command: str, config: TrainConfig, needs: Needs, cluster: Cluster) -> list[str]:
    """A line for each group of devices, and what will probably not fit. Of what no plan can be made (a device or a
    model of an unknown kind), nothing is said."""
    try:
        placement = place(config, needs)
        shape = shape_of(cluster.gpu_kinds if cluster.device == "cuda" else [], placement)
        plan = plan_run(command, config, needs, shapes_of(config, needs, local_config_json), shape)
    except (ConfigError, ModelError):
        return []
    return [*_holdings(plan), *(f"warning: {line} Ask `rlhf plan` for what would fit." for line in shortages(plan))]


def _holdings(plan: Plan) -> list[str]:
    return [
        f"memory: {name} up to about {size / GIB:.1f} GiB a process"
        for group in plan.groups
        for name, size in group.processes.items()
    ]
