"""Every grouping of the roles on clusters of every shape: placed where it can be, refused with a reason where not."""

from collections.abc import Iterator

import pytest

from rlhf.errors import ConfigError
from rlhf.planning.layout import bundle_sizes, core_share, lay_out, too_few_nodes
from rlhf.planning.placement import Placement, Shape, plan_placement
from rlhf.types import Role

ROLES = (Role.POLICY, Role.REFERENCE, Role.CRITIC, Role.REWARD, Role.ROLLOUT)
TWO = Shape(num_nodes=1, num_devices_per_node=2)
CLUSTERS = ([2], [4], [5], [8], [10], [4, 4], [1] * 5, [3, 3, 3], [2] * 5, [8, 1, 1])
"""Free devices of each node."""


def partitions(roles: tuple[Role, ...]) -> Iterator[list[tuple[Role, ...]]]:
    """Every way to put roles into groups."""
    if not roles:
        yield []
        return
    first, rest = roles[0], roles[1:]
    for others in partitions(rest):
        yield [(first,), *others]
        for n, group in enumerate(others):
            yield [(first, *group), *others[:n], *others[n + 1 :]]


GROUPINGS = list(partitions(ROLES))


def test_there_are_52_groupings() -> None:
    assert len(GROUPINGS) == 52


@pytest.mark.parametrize("groups", GROUPINGS, ids=lambda groups: "|".join("+".join(group) for group in groups))
def test_every_grouping_is_placed_or_refused(groups: list[tuple[Role, ...]]) -> None:
    colocate = tuple(",".join(group) for group in groups if len(group) > 1)
    placement = plan_placement(dict.fromkeys(ROLES, TWO), colocate, num_engines=1)
    assert placement.num_devices == 2 * len(groups)
    for free in CLUSTERS:
        room = sum(devices // 2 for devices in free)
        if room < len(groups):
            with pytest.raises(ConfigError, match=r"placement: [\w+]+: its bundle needs 2 devices; free are "):
                lay_out(placement, free)
            continue
        bundles = lay_out(placement, free)
        taken = [sum(bundle.num_devices for bundle in bundles if bundle.node == node) for node in range(len(free))]
        assert sum(taken) == placement.num_devices
        assert all(have >= used for have, used in zip(free, taken, strict=True))


def test_a_group_over_nodes_takes_different_ones() -> None:
    spread = Shape(num_nodes=2, num_devices_per_node=2)
    placement = plan_placement({Role.POLICY: spread, Role.CRITIC: spread}, ("policy,critic",))
    bundles = lay_out(placement, [8, 8])
    assert [bundle.node for bundle in bundles] == [0, 1]
    with pytest.raises(ConfigError, match=r"bundle 2 of 2 needs 2 devices on a node other than 0; free are no nodes"):
        lay_out(placement, [8])


def test_engines_may_share_a_node() -> None:
    placement = plan_placement(
        {Role.POLICY: TWO, Role.ROLLOUT: Shape(num_nodes=3, num_devices_per_node=2)}, (), num_engines=3
    )
    assert [bundle_sizes(group) for group in placement.groups] == [[2], [2, 2, 2]]
    assert {bundle.node for bundle in lay_out(placement, [8])} == {0}


def engines(number: int, each: int, nodes: int) -> Placement:
    shapes = {Role.ROLLOUT: Shape(num_nodes=number * nodes, num_devices_per_node=each // nodes)}
    return plan_placement(shapes, (), num_engines=number, nodes_per_engine=nodes)


@pytest.mark.parametrize(
    ("number", "each", "nodes", "free", "places"),
    [
        (1, 16, 2, [8, 8], [0, 1]),
        (2, 8, 2, [8, 8], [0, 1, 0, 1]),
        (3, 2, 2, [3, 2, 1], [0, 1, 0, 1, 0, 2]),
        (2, 16, 2, [8] * 4, [0, 1, 2, 3]),
        (2, 2, 2, [2, 1, 1], [0, 1, 0, 2]),  # the fullest nodes first would leave the second engine one node
        (1, 6, 3, [8, 8, 1], [0, 1, None]),
    ],
)
def test_parts_of_one_engine_are_on_different_nodes(
    number: int, each: int, nodes: int, free: list[int], places: list[int | None]
) -> None:
    placement = engines(number, each, nodes)
    assert [bundle_sizes(group) for group in placement.groups] == [[each // nodes] * number * nodes]
    if None not in places:
        assert [bundle.node for bundle in lay_out(placement, free)] == places
        return
    with pytest.raises(ConfigError, match=rf"rollout: bundle {len(places)} of {number * nodes} needs .* other than"):
        lay_out(placement, free)


def test_what_is_spread_over_more_nodes_than_there_are_is_named_by_its_setting() -> None:
    policy = plan_placement({Role.POLICY: Shape(num_nodes=3, num_devices_per_node=1)}, ())
    assert too_few_nodes(policy, 2) == ["policy.num_nodes: 3 nodes, and there are 2."]
    assert too_few_nodes(engines(2, 4, 2), 1) == ["rollout.num_nodes_per_engine: 2 nodes, and there is 1."]
    assert too_few_nodes(engines(2, 4, 2), 2) == []


def test_the_largest_bundle_is_placed_first() -> None:
    shapes = {
        Role.REFERENCE: Shape(num_nodes=1, num_devices_per_node=1),
        Role.POLICY: Shape(num_nodes=1, num_devices_per_node=4),
    }
    nodes = {bundle.group.name: bundle.node for bundle in lay_out(plan_placement(shapes, ()), [4, 1])}
    assert nodes == {"policy": 0, "reference": 1}


def test_a_refusal_says_what_every_node_has() -> None:
    placement = plan_placement({Role.POLICY: Shape(num_nodes=1, num_devices_per_node=8)}, ())
    with pytest.raises(ConfigError) as refused:
        lay_out(placement, [3, 4, 4, 4])
    assert refused.value.problems == (
        "placement: policy: its bundle needs 8 devices; free are 3 on node 0, 4 on each of nodes 1 to 3.",
    )


@pytest.mark.parametrize(
    ("num_roles", "cores", "share"),
    [
        (1, [2], 1.0),
        (5, [2], 0.4),
        (3, [1, 1], 0.5),  # two thirds would leave the third role without a node
        (3, [1, 1, 1], 1.0),
        (5, [3, 1], 0.75),
        (2, [8], 1.0),
    ],
)
def test_roles_without_gpus_share_cores_so_that_all_find_room(num_roles: int, cores: list[float], share: float) -> None:
    one = Shape(num_nodes=1, num_devices_per_node=1)
    placement = plan_placement(dict.fromkeys(ROLES[:num_roles], one), (), num_engines=1)
    assert core_share(placement, cores) == pytest.approx(share)


def test_a_group_over_more_nodes_than_there_are_is_refused() -> None:
    placement = plan_placement({Role.POLICY: Shape(num_nodes=3, num_devices_per_node=1)}, ())
    with pytest.raises(ConfigError, match="policy: bundle 2 of 3 needs 1 device on a node other than 0"):
        core_share(placement, [8])
