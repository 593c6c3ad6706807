"""The bundles of a run on a cluster of Ray nodes that say they have GPUs: the real placement, by the real scheduler.

Run as `python -m benchmarks.seventy.placement RESULT FLAG...`. No worker is started.
"""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

from ray.cluster_utils import Cluster as Nodes
from ray.util.placement_group import PlacementGroup, placement_group_table

from rlhf.actors.cluster import Cluster
from rlhf.actors.connection import LOOPBACK, loopback_only
from rlhf.algorithms.needs import needs_of
from rlhf.config.commands import TrainConfig
from rlhf.config.loading.load import load_config
from rlhf.planning.roles import place

NUM_NODES, GPUS_PER_NODE = 8, 8
STORE_BYTES = 100 * 2**20


def start_nodes() -> Nodes:
    """Nodes of this machine, with GPUs as far as the scheduler knows."""
    os.environ["RAY_prestart_worker_first_driver"] = "0"  # noqa: SIM112  as Ray spells it
    nodes = Nodes()
    for _ in range(NUM_NODES):
        nodes.add_node(
            num_cpus=GPUS_PER_NODE,
            num_gpus=GPUS_PER_NODE,
            object_store_memory=STORE_BYTES,
            node_ip_address=LOOPBACK,
            include_dashboard=False,
        )
    return nodes


def main() -> None:
    result, *flags = sys.argv[1:]
    config = load_config("grpo", flags, {})
    with loopback_only():  # the driver too: Ray would replace the address
        figures = reserved_bundles(config)
    Path(result).write_text(json.dumps(figures))


def reserved_bundles(config: TrainConfig) -> dict[str, object]:
    """What a run reserves, and on how many nodes."""
    nodes = start_nodes()
    try:
        section = config.cluster.model_copy(update={"address": nodes.address, "allow_unauthenticated": True})
        start = time.monotonic()
        with Cluster(section, "seventy") as cluster:
            slots = cluster.reserve(place(config, needs_of(config.algo)))
            reserved = {bundles.name: _gpus_per_node(bundles.placement_group) for bundles in cluster._reserved}
            return {
                "seconds": time.monotonic() - start,
                "slots": {str(role): len(found) for role, found in slots.items()},
                "gpus_per_node": {name: sorted(gpus.values(), reverse=True) for name, gpus in reserved.items()},
                "nodes": len({node for gpus in reserved.values() for node in gpus}),
            }
    finally:
        nodes.shutdown()


def _gpus_per_node(group: PlacementGroup) -> Counter[str]:
    table = placement_group_table(group)
    gpus: Counter[str] = Counter()
    for index, node in table["bundles_to_node_id"].items():
        gpus[node] += int(table["bundles"][index]["GPU"])
    return gpus


if __name__ == "__main__":
    main()
