"""Where roles are placed, as data: a pure function from the devices that roles ask for to groups of devices and their
bundles."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf.config.rules.colocation import colocated_roles, engines_misfit
from rlhf.errors import ConfigError
from rlhf.types import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Devices that a role asks for."""

    num_nodes: int
    num_devices_per_node: int

    @property
    def num_devices(self) -> int:
        return self.num_nodes * self.num_devices_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceGroup:
    """Roles that share devices. One bundle for each node, with all devices that the group has there.

    Roles that train or score share processes, one for each device. Rollout engines always have processes of their own,
    which share the devices if the group also has other roles.
    """

    roles: tuple[Role, ...]
    shape: Shape
    num_engines: int = 0
    devices_per_engine: int = 1
    nodes_per_engine: int = 1
    """Nodes that one engine is spread over, with equally many of its devices on each."""

    @property
    def name(self) -> str:
        return "+".join(self.roles)

    @property
    def devices_of_part(self) -> int:
        """Devices of one engine on one of its nodes."""
        return self.devices_per_engine // self.nodes_per_engine

    @property
    def engine_parts(self) -> list[range]:
        """For every part of every engine, those of one engine after each other: the ranks of the group's models whose
        devices it shares. A part is what an engine has on one node."""
        each, per_node = self.devices_of_part, self.shape.num_devices_per_node
        side_by_side = max(1, per_node // each)
        parts = []
        for engine in range(self.num_engines):
            block, place = divmod(engine, side_by_side)
            for node in range(block * self.nodes_per_engine, (block + 1) * self.nodes_per_engine):
                first = node * per_node + place * each
                parts.append(range(first, first + each))
        return parts

    @property
    def is_shared_by_engines(self) -> bool:
        """Whether engines compute on the devices of models (colocated, hybrid engine)."""
        return Role.ROLLOUT in self.roles and self.roles != (Role.ROLLOUT,)

    @property
    def num_processes_per_device(self) -> int:
        """How many processes use a device of this group at the same time."""
        models = any(role != Role.ROLLOUT for role in self.roles)
        return int(models) + int(Role.ROLLOUT in self.roles)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """All device groups of a run."""

    groups: tuple[DeviceGroup, ...]

    @property
    def num_devices(self) -> int:
        return sum(group.shape.num_devices for group in self.groups)

    def group_of(self, role: Role) -> DeviceGroup:
        return next(group for group in self.groups if role in group.roles)


def plan_placement(
    shapes: Mapping[Role, Shape],
    colocate: Sequence[str],
    *,
    num_engines: int = 0,
    nodes_per_engine: int = 1,
) -> Placement:
    """Group roles by the `colocate` flags; a role that no flag names has a group of its own.

    `shapes` holds only the roles that the run starts; a flag may name others, which then do not count. Merged roles
    must ask for equal shapes, except rollout engines, which use the devices of the group that they join. The shape of
    the engines has a node for each of the `nodes_per_engine` parts of each engine.

    Raises:
        ConfigError: merged model roles ask for different shapes, or the engines do not fit on the group's devices.
    """
    merged = [tuple(Role(name) for name in names) for names in colocated_roles(colocate)]
    problems: list[str] = []
    groups: list[DeviceGroup] = []
    placed: set[Role] = set()
    for role in shapes:
        if role in placed:
            continue
        together = next((roles for roles in merged if role in roles), (role,))
        roles = tuple(other for other in shapes if other in together)
        placed.update(roles)
        models = [other for other in roles if other != Role.ROLLOUT]
        shape = shapes[models[0]] if models else shapes[role]
        problems += [
            f"cluster.colocate: {models[0]} asks for {shape.num_nodes} x {shape.num_devices_per_node} devices and "
            f"{other} for {shapes[other].num_nodes} x {shapes[other].num_devices_per_node}. Roles that share devices "
            f"need the same num_nodes and num_gpus_per_node."
            for other in models[1:]
            if shapes[other] != shape
        ]
        engines = num_engines if Role.ROLLOUT in roles else 0
        nodes = nodes_per_engine if engines else 1
        each = shapes[Role.ROLLOUT].num_devices_per_node * nodes if engines else 1
        group = DeviceGroup(
            roles=roles, shape=shape, num_engines=engines, devices_per_engine=each, nodes_per_engine=nodes
        )
        if engines and models:
            problems += _misfit(group, models[0])
        groups.append(group)
    if problems:
        raise ConfigError(problems)
    return Placement(groups=tuple(groups))


def _misfit(group: DeviceGroup, role: Role) -> list[str]:
    misfit = engines_misfit(
        group.num_engines,
        group.devices_per_engine,
        nodes_per_engine=group.nodes_per_engine,
        num_nodes=group.shape.num_nodes,
        gpus_per_node=group.shape.num_devices_per_node,
        role=role,
    )
    return [] if misfit is None else [": ".join(misfit)]


def shortages(placement: Placement, free_per_node: Sequence[float]) -> list[str]:
    """Why a placement does not fit on nodes with these numbers of free devices; empty if it fits."""
    problems: list[str] = []
    total = sum(free_per_node)
    if placement.num_devices > total:
        parts = ", ".join(f"{group.name} {group.shape.num_devices}" for group in placement.groups)
        problems.append(
            f"resources: need {placement.num_devices} GPUs ({parts}), cluster has {total:g}. "
            f"Merge roles with --colocate, or ask for fewer."
        )
    largest = max(free_per_node, default=0.0)
    problems += [
        f"resources: {group.name} needs {group.shape.num_devices_per_node} GPUs on one node, largest node has "
        f"{largest:g} free. {_remedy(group)}."
        for group in placement.groups
        if group.shape.num_devices_per_node > largest
    ]
    return problems


def _remedy(group: DeviceGroup) -> str:
    """What makes a group need fewer devices on one node."""
    if group.roles == (Role.ROLLOUT,):
        return "Lower rollout.tensor_parallel_size, or raise rollout.num_nodes_per_engine"
    return f"Spread it with more {group.roles[0]}.num_nodes"
