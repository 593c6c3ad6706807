"""A search for better placements of the same run on the same cluster."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from rlhf.config.commands import OnlineConfig
from rlhf.planning.edits import changes
from rlhf.planning.fixes import Edits, Planner, fitting, savings
from rlhf.planning.hardware import ClusterShape
from rlhf.planning.plan import Plan
from rlhf.types import Role

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Parts of the cluster that a group of models may get."""
TENSOR_PARALLEL = (1, 2, 4, 8)
OVER_NODES = (2, 4)
"""Nodes of one engine."""
SHARED_MEMORY = 0.5
"""gpu_memory_utilization of engines that share devices with models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A placement as flags, and its plan."""

    edits: Edits
    plan: Plan


@dataclass(frozen=True, slots=True)
class _Engine:
    """The size of an engine."""

    num_nodes: int
    tensor_parallel: int
    stages: int

    @property
    def num_devices(self) -> int:
        return self.tensor_parallel * self.stages

    def edits(self, number: int) -> Edits:
        """For this many engines."""
        return {
            "rollout.num_engines": number,
            "rollout.tensor_parallel_size": self.tensor_parallel,
            "rollout.pipeline_parallel_size": self.stages,
            "rollout.num_nodes_per_engine": self.num_nodes,
        }


def suggest(
    config: OnlineConfig, planner: Planner, cluster: ClusterShape, roles: Sequence[Role], count: int = 3
) -> list[Suggestion]:
    """The fastest placements that fit, best first; of equally fast ones, the one with fewer devices. Only the best of
    each grouping, so that they differ. If none fits, the same search with everything that saves memory; then with
    engines that are spread over nodes. `roles` are the models that the run starts."""
    over_nodes = [nodes for nodes in OVER_NODES if nodes <= cluster.num_nodes]
    for base, node_counts in (({}, [1]), (savings(config), [1]), (savings(config), over_nodes)):
        best: dict[tuple[str, ...], Suggestion] = {}
        for candidate in candidates(tuple(roles), cluster, node_counts):
            edits = base | named(config, candidate)
            plan = fitting(config, edits, planner)
            if plan is None:
                continue
            grouping = tuple(group.name for group in plan.placement.groups)
            if grouping not in best or _key(plan) < _key(best[grouping].plan):
                best[grouping] = Suggestion(edits=edits, plan=plan)
        if best:
            ordered = sorted(best.values(), key=lambda suggestion: _key(suggestion.plan))[:count]
            return [Suggestion(edits=changes(config, one.edits), plan=one.plan) for one in ordered]
    return []


def named(config: OnlineConfig, edits: Edits) -> dict[str, object]:
    """The edits under the keys that the config has: a reward model may be one of a list of sources."""
    reward = next((name for name in config.models if name.startswith("reward.sources.")), "reward")
    return {
        key.replace("reward.", f"{reward}.", 1) if key.startswith("reward.") else key: v for key, v in edits.items()
    }


def candidates(roles: tuple[Role, ...], cluster: ClusterShape, node_counts: Sequence[int] = (1,)) -> Iterator[Edits]:
    """Every grouping with every split of the cluster among its groups; engines get the rest. Each engine is on one
    node, or on all of as many as `node_counts` says: as one stage over these, or as one on each."""
    engines = [
        _Engine(nodes, parallel * nodes // stages, stages)
        for nodes in node_counts
        for parallel in (TENSOR_PARALLEL if nodes == 1 else [cluster.devices_per_node])
        for stages in sorted({1, nodes})
        if parallel <= cluster.devices_per_node
    ]
    for groups in groupings(roles):
        colocate = tuple(",".join(group) for group in groups if len(group) > 1)
        for shares in product(SHARES, repeat=len(groups)):
            sizes = [_size(share, cluster) for share in shares]
            if any(size is None for size in sizes):
                continue
            shapes = [size for size in sizes if size is not None]
            left = cluster.num_devices - sum(nodes * each for nodes, each in shapes)
            for engine in engines:
                if left >= engine.num_devices:
                    yield {
                        "cluster.colocate": colocate,
                        **_shapes(groups, shapes),
                        **engine.edits(left // engine.num_devices),
                    }
    everything = (cluster.num_nodes, cluster.devices_per_node)
    for engine in engines:
        side_by_side = cluster.devices_per_node // (engine.num_devices // engine.num_nodes)
        yield {
            "cluster.colocate": ("all",),
            **_shapes([roles], [everything]),
            **engine.edits(side_by_side * (cluster.num_nodes // engine.num_nodes)),
            "rollout.gpu_memory_utilization": SHARED_MEMORY,
        }


def groupings(roles: tuple[Role, ...]) -> list[list[tuple[Role, ...]]]:
    """Each role alone; those that learn and those that score merged; all models together."""
    alone: list[tuple[Role, ...]] = [(role,) for role in roles]
    pairs = [(Role.POLICY, Role.REFERENCE), (Role.CRITIC, Role.REWARD)]
    merged = [pair for pair in pairs if set(pair) <= set(roles)]
    in_pairs = [*merged, *((role,) for role in roles if not any(role in pair for pair in merged))]
    found: list[list[tuple[Role, ...]]] = []
    for grouping in (alone, in_pairs, [roles]):
        if grouping not in found:
            found.append(grouping)
    return found


def _shapes(groups: list[tuple[Role, ...]], shapes: list[tuple[int, int]]) -> Edits:
    return {
        f"{role}.{key}": value
        for group, shape in zip(groups, shapes, strict=True)
        for role in group
        for key, value in zip(("num_nodes", "num_gpus_per_node"), shape, strict=True)
    }


def _size(share: float, cluster: ClusterShape) -> tuple[int, int] | None:
    """Nodes and devices on each, for a part of the cluster; None if it is less than a device or not a whole number of
    nodes."""
    devices = share * cluster.num_devices
    if devices < 1 or devices != int(devices):
        return None
    if devices <= cluster.devices_per_node:
        return 1, int(devices)
    nodes = devices / cluster.devices_per_node
    return (int(nodes), cluster.devices_per_node) if nodes == int(nodes) else None


def _key(plan: Plan) -> tuple[float, int]:
    return round(plan.step_s, 3), plan.placement.num_devices
