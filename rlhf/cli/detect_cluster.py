"""The cluster that a run would use: the nodes of the Ray cluster that it would join, or this machine."""

import os

from rlhf.config.commands import TrainConfig
from rlhf.launch.local_gpus import local_gpus
from rlhf.planning.cluster_shape import shape_of
from rlhf.planning.hardware import ClusterShape
from rlhf.planning.placement import Placement


def detect_cluster(config: TrainConfig, placement: Placement) -> ClusterShape:
    """The nodes for a run of this config: those of the Ray cluster that it would join, or this machine.

    Raises:
        ConfigError: as `shape_of`; or there is no such cluster.
    """
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    nodes = _ray_nodes(address) if address else [local_gpus()]
    return shape_of([] if config.cluster.device == "cpu" else nodes, placement)


def _ray_nodes(address: str) -> list[list[str]]:
    """Kind of each GPU of each node."""
    # A plan for a described cluster, or for this machine, does without Ray.
    import ray  # noqa: PLC0415

    from rlhf.actors.cluster import gpus_of  # noqa: PLC0415
    from rlhf.actors.connection import connect, disconnect  # noqa: PLC0415

    orphans = connect(address, "rlhf-plan")
    try:
        return [gpus_of(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    finally:
        disconnect(orphans)
