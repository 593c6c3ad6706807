"""Which GPUs ranks and engines get. Ray counts GPUs that it is shared of; nothing computes here."""

from collections.abc import Iterator
from functools import partial
from typing import cast

import pytest
import ray

from rlhf.actors.actor import Actor
from rlhf.actors.calls import Call, Worker
from rlhf.actors.cluster import Cluster, WorkerSlot
from rlhf.actors.launcher import gpus_of_parts
from rlhf.config.run import ClusterSection
from rlhf.planning.placement import Placement, Shape, plan_placement
from rlhf.types import Role

pytestmark = pytest.mark.timeout(240)

NUM_GPUS = 8


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", partial(ray.init, num_gpus=NUM_GPUS, num_cpus=NUM_GPUS))
        cluster = Cluster(ClusterSection(), namespace="test", log_folder=tmp_path_factory.mktemp("logs"))
    yield cluster
    cluster.close()


def placed(num_ranks: int, num_engines: int, each: int, *colocate: str) -> Placement:
    """A policy and engines."""
    shapes = {
        Role.POLICY: Shape(num_nodes=1, num_devices_per_node=num_ranks),
        Role.ROLLOUT: Shape(num_nodes=num_engines, num_devices_per_node=each),
    }
    return plan_placement(shapes, colocate, num_engines=num_engines)


def start(cluster: Cluster, slots: list[WorkerSlot], role: Role) -> list[Worker]:
    return cluster.wait_started(
        [cluster.start_worker(Actor, slot, name=f"{role} {i}", title="Toy", env={}) for i, slot in enumerate(slots)]
    )


def gpus(cluster: Cluster, workers: list[Worker]) -> list[list[str]]:
    """Those that Ray gave them."""
    calls = [Call(worker=worker, ref=worker.handle.gpus.remote()) for worker in workers]
    return cast(list[list[str]], cluster.calls.wait_all(calls, phase="gpus", timeout_s=60.0))


@pytest.mark.parametrize(("num_ranks", "num_engines", "each"), [(4, 4, 1), (4, 2, 2), (3, 1, 2)])
def test_engines_share_the_gpus_of_ranks(cluster: Cluster, num_ranks: int, num_engines: int, each: int) -> None:
    """Every rank has a GPU that no other rank has, whatever else computes there."""
    placement = placed(num_ranks, num_engines, each, "policy,rollout")
    slots = cluster.reserve(placement)
    ranks = start(cluster, slots[Role.POLICY], Role.POLICY)
    engines = start(cluster, slots[Role.ROLLOUT], Role.ROLLOUT)
    own = gpus(cluster, ranks)
    assert [len(one) for one in own] == [1] * num_ranks
    assert len({one[0] for one in own}) == num_ranks
    assert gpus(cluster, engines) == [[]] * num_engines  # Ray gives them none: they are told
    shared = gpus_of_parts(placement.group_of(Role.ROLLOUT), ranks, cluster.calls)
    assert shared == [[own[engine * each + i][0] for i in range(each)] for engine in range(num_engines)]
    cluster.clear()


def test_engines_of_their_own_hold_their_gpus(cluster: Cluster) -> None:
    slots = cluster.reserve(placed(4, 2, 2))
    ranks = start(cluster, slots[Role.POLICY], Role.POLICY)
    engines = start(cluster, slots[Role.ROLLOUT], Role.ROLLOUT)
    found = gpus(cluster, [*ranks, *engines])
    assert [len(one) for one in found] == [1, 1, 1, 1, 2, 2]
    assert len({gpu for one in found for gpu in one}) == NUM_GPUS
    cluster.clear()


def test_engines_stay_on_one_node() -> None:
    """Three nodes of four GPUs, engines of two and of three."""
    shapes = {
        Role.POLICY: Shape(num_nodes=3, num_devices_per_node=4),
        Role.ROLLOUT: Shape(num_nodes=6, num_devices_per_node=2),
    }
    (pairs,) = plan_placement(shapes, ["all"], num_engines=6).groups
    assert [list(part) for part in pairs.engine_parts] == [[2 * i, 2 * i + 1] for i in range(6)]
    shapes[Role.ROLLOUT] = Shape(num_nodes=3, num_devices_per_node=3)
    (triples,) = plan_placement(shapes, ["all"], num_engines=3).groups
    assert [list(part) for part in triples.engine_parts] == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
