"""Placement is a pure plan: tables of flags and shapes."""

import pytest

from rlhf.config.loading.load import load_config
from rlhf.config.rules.colocation import ROLES
from rlhf.errors import ConfigError
from rlhf.planning.placement import Shape, plan_placement, shortages
from rlhf.types import Role

FOUR = Shape(num_nodes=1, num_devices_per_node=4)
SHAPES = {
    Role.POLICY: FOUR,
    Role.REFERENCE: FOUR,
    Role.CRITIC: FOUR,
    Role.REWARD: FOUR,
    Role.ROLLOUT: Shape(num_nodes=4, num_devices_per_node=2),
}


@pytest.mark.parametrize(
    ("colocate", "names", "num_devices"),
    [
        ((), ["policy", "reference", "critic", "reward", "rollout"], 24),
        (("policy,reference",), ["policy+reference", "critic", "reward", "rollout"], 20),
        (("policy,reference", "critic,reward"), ["policy+reference", "critic+reward", "rollout"], 16),
        (("reference,policy", "reward,critic"), ["policy+reference", "critic+reward", "rollout"], 16),
        (("all",), ["policy+reference+critic+reward+rollout"], 4),
        (("policy,rollout",), ["policy+rollout", "reference", "critic", "reward"], 16),
    ],
)
def test_roles_are_grouped_by_the_flags(colocate: tuple[str, ...], names: list[str], num_devices: int) -> None:
    placement = plan_placement(SHAPES, colocate, num_engines=2)
    assert [group.name for group in placement.groups] == names
    assert placement.num_devices == num_devices


def test_a_flag_may_name_a_role_that_the_run_does_not_start() -> None:
    placement = plan_placement({Role.POLICY: FOUR}, ("policy,reference",))
    assert [group.name for group in placement.groups] == ["policy"]


def test_shared_devices_hold_one_process_for_models_and_one_for_the_engine() -> None:
    placement = plan_placement(SHAPES, ("all",), num_engines=2)
    assert placement.groups[0].num_processes_per_device == 2
    assert plan_placement(SHAPES, (), num_engines=4).groups[0].num_processes_per_device == 1


def test_merged_roles_of_unequal_shape_are_refused() -> None:
    shapes = SHAPES | {Role.REFERENCE: Shape(num_nodes=1, num_devices_per_node=2)}
    with pytest.raises(ConfigError, match=r"policy asks for 1 x 4 devices and reference for 1 x 2"):
        plan_placement(shapes, ("policy,reference",), num_engines=4)


def test_more_engines_than_shared_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"3 engines of 2 GPUs do not fit on the 1 x 4 devices .* at most 2"):
        plan_placement(SHAPES, ("all",), num_engines=3)


@pytest.mark.parametrize(("each", "engines", "per_node"), [(16, 1, 8), (2, 3, 3)])
def test_what_the_placement_refuses_a_check_refuses_before(each: int, engines: int, per_node: int) -> None:
    policy, rollout = Shape(num_nodes=2, num_devices_per_node=per_node), Shape(num_nodes=1, num_devices_per_node=each)
    flags = [f"--policy.num-nodes=2 --policy.num-gpus-per-node={per_node} --rollout.num-engines={engines}"]
    flags += [f"--rollout.tensor-parallel-size={each} --colocate=policy,rollout --reward.function=r:f"]
    with pytest.raises(ConfigError) as placed:
        plan_placement({Role.POLICY: policy, Role.ROLLOUT: rollout}, ("policy,rollout",), num_engines=engines)
    with pytest.raises(ConfigError) as checked:
        load_config("grpo", [*" ".join(flags).split(), "--policy.model=m", "--data.path=d"], {})
    (problem,) = placed.value.problems
    assert any(line.endswith(problem.partition(": ")[2]) for line in checked.value.problems)


def test_the_roles_of_flags_are_those_of_a_run() -> None:
    assert tuple(Role) == ROLES


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        ([8, 8, 8], []),
        (
            [8, 8],
            [
                "resources: need 24 GPUs (policy 4, reference 4, critic 4, reward 4, rollout 8), cluster has 16. "
                "Merge roles with --colocate, or ask for fewer."
            ],
        ),
        (
            [2] * 12,
            [
                f"resources: {role} needs 4 GPUs on one node, largest node has 2 free. Spread it with more "
                f"{role}.num_nodes."
                for role in ("policy", "reference", "critic", "reward")
            ],
        ),
    ],
)
def test_what_is_short_is_named(free: list[float], expected: list[str]) -> None:
    assert shortages(plan_placement(SHAPES, (), num_engines=4), free) == expected


def test_wide_engines_need_a_lower_tensor_parallel_size() -> None:
    """Rollout has no num_nodes that could be raised."""
    shapes = {Role.POLICY: Shape(num_nodes=1, num_devices_per_node=1)}
    wide = {Role.ROLLOUT: Shape(num_nodes=1, num_devices_per_node=4)}
    assert shortages(plan_placement(shapes | wide, (), num_engines=1), [2, 2, 2]) == [
        "resources: rollout needs 4 GPUs on one node, largest node has 2 free. Lower rollout.tensor_parallel_size, or "
        "raise rollout.num_nodes_per_engine."
    ]


@pytest.mark.parametrize(
    ("policy", "engines", "each", "nodes", "parts"),
    [
        ((2, 8), 2, 8, 1, [range(8), range(8, 16)]),
        ((2, 8), 1, 16, 2, [range(8), range(8, 16)]),
        ((2, 8), 2, 8, 2, [range(4), range(8, 12), range(4, 8), range(12, 16)]),
        ((4, 4), 2, 8, 2, [range(4), range(4, 8), range(8, 12), range(12, 16)]),
        ((5, 3), 2, 4, 2, [range(2), range(3, 5), range(6, 8), range(9, 11)]),
    ],
)
def test_an_engine_over_nodes_has_equally_many_ranks_of_each(
    policy: tuple[int, int], engines: int, each: int, nodes: int, parts: list[range]
) -> None:
    shapes = {
        Role.POLICY: Shape(num_nodes=policy[0], num_devices_per_node=policy[1]),
        Role.ROLLOUT: Shape(num_nodes=engines * nodes, num_devices_per_node=each // nodes),
    }
    (group,) = plan_placement(shapes, ("policy,rollout",), num_engines=engines, nodes_per_engine=nodes).groups
    assert group.engine_parts == parts
    assert (group.devices_per_engine, group.devices_of_part) == (each, each // nodes)


def test_engines_over_nodes_of_their_own_have_a_bundle_for_each_part() -> None:
    shapes = {Role.ROLLOUT: Shape(num_nodes=4, num_devices_per_node=8)}
    (group,) = plan_placement(shapes, (), num_engines=2, nodes_per_engine=2).groups
    assert [list(part) for part in group.engine_parts] == [list(range(n * 8, n * 8 + 8)) for n in range(4)]
    assert group.shape.num_devices == 32


@pytest.mark.parametrize(
    ("policy", "engines", "each", "nodes", "text"),
    [
        ((1, 8), 1, 8, 2, "num_nodes_per_engine: an engine has 2 nodes, and policy, .* has 1. Set it to at most 1"),
        ((2, 8), 1, 32, 2, "tensor_parallel_size: an engine needs 16 GPUs on each of 2 nodes, .* at most 16 \\("),
        ((2, 8), 1, 16, 1, r"needs 16 GPUs on one node, .* at most 8 \(.*\), or raise rollout\.num_nodes_per_engine"),
        ((3, 8), 2, 16, 2, "num_engines: 2 engines of 16 GPUs do not fit on the 3 x 8 devices .* Set it to at most 1"),
    ],
)
def test_engines_over_nodes_that_do_not_fit_on_shared_devices_are_refused(
    policy: tuple[int, int], engines: int, each: int, nodes: int, text: str
) -> None:
    shapes = {
        Role.POLICY: Shape(num_nodes=policy[0], num_devices_per_node=policy[1]),
        Role.ROLLOUT: Shape(num_nodes=engines * nodes, num_devices_per_node=each // nodes),
    }
    with pytest.raises(ConfigError, match=text):
        plan_placement(shapes, ("policy,rollout",), num_engines=engines, nodes_per_engine=nodes)
