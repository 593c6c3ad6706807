"""Which node each group's bundles go to, as in Ray's placement groups, or why they do not fit."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.errors import ConfigError
from rlhf.planning.placement import DeviceGroup, Placement
from rlhf.types import Role

ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Devices of one group on one node."""

    group: DeviceGroup
    index: int
    num_devices: int
    node: int


def bundle_sizes(group: DeviceGroup) -> list[int]:
    """Devices of each of a group's bundles. Rollout engines with devices of their own have one for each of their
    parts."""
    if group.roles == (Role.ROLLOUT,):
        return [group.devices_of_part] * group.num_engines * group.nodes_per_engine
    return [group.shape.num_devices_per_node] * group.shape.num_nodes


def bundles_apart(group: DeviceGroup) -> int:
    """How many of a group's bundles in a row go to different nodes: all of a model's, those of one rollout engine."""
    return group.nodes_per_engine if group.roles == (Role.ROLLOUT,) else group.shape.num_nodes


def too_few_nodes(placement: Placement, num_nodes: int) -> list[str]:
    """What is spread over more nodes than there are: the setting, and a sentence."""
    spread = {
        "rollout.num_nodes_per_engine" if group.roles == (Role.ROLLOUT,) else f"{group.roles[0]}.num_nodes": group
        for group in placement.groups
    }
    return [
        f"{key}: {bundles_apart(group)} nodes, and there {'is' if num_nodes == 1 else 'are'} {num_nodes}."
        for key, group in spread.items()
        if bundles_apart(group) > num_nodes
    ]


def lay_out(placement: Placement, free: Sequence[int]) -> list[Bundle]:
    """Put every bundle on a node with room, largest first, on the fullest node that still has room. The bundles of a
    model that is spread over nodes go to different nodes, and so do those of one rollout engine.

    `free` holds each node's free devices.

    Raises:
        ConfigError: a bundle fits on no node. The message names it, what it needs, and what every node has left.
    """
    left = list(free)
    bundles: list[Bundle] = []
    problems: list[str] = []
    groups = sorted(placement.groups, key=lambda group: (-max(bundle_sizes(group)), -len(bundle_sizes(group))))
    for group in groups:
        # Engines over nodes take the emptiest ones: only so is there room for as many of them as there can be.
        order = -1 if group.nodes_per_engine > 1 else 1
        sizes, taken = bundle_sizes(group), set[int]()
        for index, size in enumerate(sizes):
            if index % bundles_apart(group) == 0:
                taken = set()
            room = [node for node, devices in enumerate(left) if devices >= size and node not in taken]
            if not room:
                problems.append(_short(group, index, len(sizes), size, left, sorted(taken)))
                break
            node = min(room, key=lambda candidate: (order * left[candidate], candidate))
            left[node] -= size
            taken.add(node)
            bundles.append(Bundle(group=group, index=index, num_devices=size, node=node))
    if problems:
        raise ConfigError(problems)
    return bundles


def core_share(placement: Placement, cores: Sequence[float]) -> float:
    """CPU cores for each device of a run without GPUs, at most 1: the largest share with which every bundle fits on a
    node.

    `cores` holds each node's cores.

    Raises:
        ConfigError: a group or an engine is spread over more nodes than there are.
    """
    shares = {min(1.0, have / devices) for have in cores for devices in range(1, placement.num_devices + 1) if have}
    refused = ConfigError("placement: no node has a core.")
    for share in sorted(shares, reverse=True):
        try:
            lay_out(placement, [int(have / share + ROUNDING) for have in cores])
        except ConfigError as error:
            refused = error
        else:
            return share
    raise refused


def _short(group: DeviceGroup, index: int, num_bundles: int, size: int, left: Sequence[int], taken: list[int]) -> str:
    which = f"bundle {index + 1} of {num_bundles}" if num_bundles > 1 else "its bundle"
    nodes = shown_nodes([n for n in range(len(left)) if n not in taken], left)
    other = f" on a node other than {', '.join(map(str, taken))}" if taken else ""
    return f"placement: {group.name}: {which} needs {_devices(size)}{other}; free are {nodes}."


def shown_nodes(nodes: Sequence[int], left: Sequence[int]) -> str:
    """`3 on node 0, 8 on each of nodes 1 to 15`."""
    runs: list[tuple[int, int, int]] = []
    for node in nodes:
        if runs and runs[-1][1] == node - 1 and runs[-1][2] == left[node]:
            runs[-1] = (runs[-1][0], node, left[node])
        else:
            runs.append((node, node, left[node]))
    parts = [
        f"{devices} on node {first}" if first == last else f"{devices} on each of nodes {first} to {last}"
        for first, last, devices in runs
    ]
    return ", ".join(parts) or "no nodes"


def _devices(number: int) -> str:
    return f"{number} device{'s' * (number != 1)}"
