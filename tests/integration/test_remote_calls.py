"""Waiting for real Ray actors: deadlines, deaths and errors name who, where and doing what."""

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from ray.exceptions import ObjectStoreFullError

from rlhf.actors import forked_worker, post_mortem
from rlhf.actors.calls import Call, Worker
from rlhf.actors.cluster import Cluster, WorkerSlot
from rlhf.actors.engine_client import RayEngineClient
from rlhf.actors.groups import GroupEngine, ReplaceableGroup, Submit, WorkerGroup
from rlhf.actors.rollout import RolloutPool
from rlhf.actors.stragglers import Stragglers
from rlhf.actors.waiting import RemoteCalls, describe_late, processes_by_node
from rlhf.config.run import ClusterSection
from rlhf.engines.base import generate
from rlhf.errors import ConfigError, RewardError, RlhfError, StallError, WeightSyncError, WorkerLostError
from rlhf.launch.fork_ahead import serving_forks
from rlhf.planning.placement import Shape, plan_placement
from rlhf.types import PackedTokens, Role, RolloutRequest, Sampling
from tests.integration.toy import PLACEMENT, start_workers

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with (
        serving_forks(PLACEMENT),
        Cluster(ClusterSection(), namespace="test", log_folder=tmp_path_factory.mktemp("logs")) as cluster,
    ):
        yield cluster


@pytest.fixture(scope="module")
def slots(cluster: Cluster) -> list[WorkerSlot]:
    return cluster.reserve(PLACEMENT)[Role.POLICY]


@pytest.fixture(scope="module")
def workers(cluster: Cluster, slots: list[WorkerSlot]) -> list[Worker]:
    return start_workers(cluster, slots[:3], Role.POLICY)


@pytest.fixture
def mortals(cluster: Cluster, slots: list[WorkerSlot]) -> Iterator[list[Worker]]:
    """Workers for tests that kill them."""
    workers = start_workers(cluster, slots[3:], Role.CRITIC)
    yield workers
    for worker in workers:
        if worker in cluster.workers:
            cluster.remove([worker])


def test_workers_are_forked_from_the_server_that_was_started_ahead(workers: list[Worker]) -> None:
    """The forecast of their environment is right, or the first worker would have started a server of its own."""
    (server,) = {psutil.Process(worker.pid).parent() for worker in workers}
    assert server is not None and server in psutil.Process().children()  # noqa: PT018
    assert Path(server.cmdline()[1]) == forked_worker.SERVER


def test_answers_come_in_order(cluster: Cluster, workers: list[Worker]) -> None:
    calls = [
        Call(worker=worker, ref=worker.handle.nap.remote(pause))
        for worker, pause in zip(workers, (0.3, 0.1, 0.0), strict=True)
    ]
    assert cluster.calls.wait_all(calls, phase="nap", timeout_s=30) == [worker.pid for worker in workers]


def test_the_late_one_is_named(cluster: Cluster, mortals: list[Worker]) -> None:
    calls = [
        Call(worker=worker, ref=worker.handle.nap.remote(pause))
        for worker, pause in zip(mortals, (0, 0, 30), strict=True)
    ]
    with pytest.raises(StallError, match=r"nap: no reply after 1 s from critic rank 2 \(node 127.0.0.1, pid \d+\)"):
        cluster.calls.wait_all(calls, phase="nap", timeout_s=1)


def test_a_stall_leaves_the_stacks_of_who_is_late_and_names_who_is_stopped(
    cluster: Cluster, mortals: list[Worker]
) -> None:
    calls = [Call(worker=worker, ref=worker.handle.nap.remote(30)) for worker in mortals]
    os.kill(mortals[1].pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(StallError) as caught:
        cluster.calls.wait_all(calls, phase="nap", timeout_s=1)
    assert time.monotonic() - start < 11, "found later than ten seconds after the deadline"
    text = str(caught.value)
    assert text.count("is stopped (by SIGSTOP or a debugger)") == 1
    assert "critic rank 1 is stopped" in text
    assert mortals[0].stacks is not None
    assert f"Their stacks: {mortals[0].stacks.parent}/*.stacks.txt." in text
    assert " in nap" in mortals[0].stacks.read_text()
    with pytest.raises(StallError):
        cluster.calls.wait_all(calls[:1], phase="nap", timeout_s=1)
    assert mortals[0].stacks.read_text().count("Current thread") == 1, "stacks of two looks are mixed"
    post_mortem.kill(processes_by_node(mortals[1:2]))
    with pytest.raises(WorkerLostError, match="critic rank 1"):
        cluster.calls.wait_all(calls[1:2], phase="nap", timeout_s=30)


def test_one_that_stays_stopped_is_not_waited_for_to_the_deadline(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, mortals: list[Worker]
) -> None:
    monkeypatch.setattr("rlhf.actors.waiting.POLL_EVERY_S", 0.3)
    os.kill(mortals[1].pid, signal.SIGSTOP)
    under_way = [Call(worker=worker, ref=worker.handle.nap.remote(20)) for worker in mortals]
    with pytest.raises(StallError, match="nap: no reply can come from") as raised:
        cluster.calls.wait_all(under_way, phase="nap", timeout_s=600)
    assert f"{mortals[1]}. {mortals[1].name} is stopped (by SIGSTOP or a debugger)." in str(raised.value)
    assert str(mortals[0]) not in str(raised.value), "who only works is not named"


def test_one_that_is_stopped_for_a_moment_is_waited_for(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, workers: list[Worker]
) -> None:
    looks = count()

    def stopped(_places: object) -> set[post_mortem.Process]:
        worker = workers[next(looks) % 2]
        return {(worker.node_id, worker.pid)}

    monkeypatch.setattr("rlhf.actors.waiting.POLL_EVERY_S", 0.1)
    monkeypatch.setattr(post_mortem, "find_stopped", stopped)
    cluster.calls.wait_all(
        [Call(worker=one, ref=one.handle.nap.remote(3)) for one in workers[:2]], phase="nap", timeout_s=600
    )
    assert next(looks) > 1


def test_a_failed_collective_is_blamed_on_the_peer_that_is_silent(cluster: Cluster, mortals: list[Worker]) -> None:
    os.kill(mortals[1].pid, signal.SIGSTOP)
    calls = [
        Call(worker=mortals[0], ref=mortals[0].handle.stumble.remote()),
        Call(worker=mortals[1], ref=mortals[1].handle.nap.remote(0)),
    ]
    with pytest.raises(StallError, match=r"forward: no reply from critic rank 1 .* is stopped .*ZeroDivisionError"):
        cluster.calls.wait_all(calls, phase="forward", timeout_s=30)
    post_mortem.kill(processes_by_node(mortals[1:2]))


def test_a_failed_collective_is_blamed_on_a_peer_whose_node_is_silent(
    cluster: Cluster, mortals: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(_task: object, places: Mapping[str, Sequence[post_mortem.LocalProcess]], *_: object) -> object:
        return {}, [(node, pid) for node, held in places.items() for pid, _ in held]

    monkeypatch.setattr(post_mortem, "_on_nodes", nobody)
    calls = [
        Call(worker=mortals[0], ref=mortals[0].handle.stumble.remote()),
        Call(worker=mortals[1], ref=mortals[1].handle.nap.remote(30)),
    ]
    with pytest.raises(StallError, match=r"critic rank 1 is on a node that does not reply\. .*ZeroDivisionError"):
        cluster.calls.wait_all(calls, phase="forward", timeout_s=30)


def test_an_error_is_not_blamed_on_a_peer_that_waits_for_its_mates(cluster: Cluster, mortals: list[Worker]) -> None:
    calls = [
        Call(worker=mortals[0], ref=mortals[0].handle.stumble.remote()),
        Call(worker=mortals[1], ref=mortals[1].handle.nap.remote(30)),
    ]
    with pytest.raises(RlhfError, match=r"critic rank 0 .* failed: ZeroDivisionError") as caught:
        cluster.calls.wait_all(calls, phase="forward", timeout_s=30)
    assert type(caught.value) is RlhfError


def test_one_that_never_came_up_is_named() -> None:
    """It has said neither where it is nor who."""
    unstarted = Worker(handle=None, name="critic rank 3", node="?", node_id="?", pid=0)
    assert processes_by_node([unstarted]) == {}
    assert describe_late([unstarted], {}) == "critic rank 3 (node ?, pid 0)."


def test_the_dead_one_is_named_at_once(cluster: Cluster, mortals: list[Worker]) -> None:
    calls = [Call(worker=worker, ref=worker.handle.nap.remote(30)) for worker in mortals]
    os.kill(mortals[1].pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(WorkerLostError, match=r"nap: critic rank 1 .* died"):
        cluster.calls.wait_all(calls, phase="nap", timeout_s=60)
    assert time.monotonic() - start < 20


def test_a_death_explains_the_failure_of_a_peer(cluster: Cluster, mortals: list[Worker]) -> None:
    os.kill(mortals[1].pid, signal.SIGKILL)
    calls = [
        Call(worker=mortals[0], ref=mortals[0].handle.stumble.remote()),
        Call(worker=mortals[1], ref=mortals[1].handle.nap.remote(0)),
    ]
    with pytest.raises(WorkerLostError, match="critic rank 1"):
        cluster.calls.wait_all(calls, phase="forward", timeout_s=30)


def test_our_own_errors_arrive_as_they_were_raised(cluster: Cluster, workers: list[Worker]) -> None:
    with pytest.raises(RewardError, match=r"^reward: p12 took over 30 s$") as caught:
        cluster.calls.wait_all([Call(worker=workers[0], ref=workers[0].handle.fail.remote())], phase="x", timeout_s=30)
    assert type(caught.value) is RewardError


def test_other_errors_say_where_they_came_from(cluster: Cluster, workers: list[Worker]) -> None:
    with pytest.raises(Exception, match=r"^forward: policy rank 0 .* failed: ZeroDivisionError: by zero$") as caught:
        cluster.calls.wait_all(
            [Call(worker=workers[0], ref=workers[0].handle.stumble.remote())], phase="forward", timeout_s=30
        )
    assert "in stumble" in str(caught.value.__cause__), "the traceback over there is lost"


def test_an_object_store_without_room_is_a_loss_that_another_start_may_not_meet(
    cluster: Cluster, workers: list[Worker]
) -> None:
    group = WorkerGroup(workers, cluster.calls)
    with pytest.raises(WorkerLostError, match=r"^x: policy rank \d \(.*: ObjectStoreFullError: .*no room for 3 GiB"):
        group.run(lambda _rank, handle: handle.overflow.remote(), phase="x", timeout_s=30)

    def submit(_rank: int, _handle: ray.actor.ActorHandle) -> ray.ObjectRef[object]:
        raise ObjectStoreFullError("no room for 3 GiB")

    with pytest.raises(WorkerLostError, match=r"^x: could not be called: .*no room for 3 GiB"):
        group.run(submit, phase="x", timeout_s=30)


def test_a_group_splits_by_rank_and_joins_again(cluster: Cluster, workers: list[Worker]) -> None:
    engine = GroupEngine(WorkerGroup(workers, cluster.calls), Role.POLICY, step_timeout_s=30, sync_timeout_s=30)
    batches = [PackedTokens(token_ids=np.array([index]), lengths=np.array([1])) for index in range(6)]
    report = engine.forward_backward(batches)  # type: ignore[arg-type]
    assert np.concatenate(engine.forward(batches)).tolist() == np.concatenate(report.outputs).tolist() == [*range(6)]
    assert (report.metrics.sums, report.metrics.maxima) == ({"n": 6.0}, {"pid": 1.0})
    with pytest.raises(ValueError, match="5 micro-batches do not split over 3 ranks"):
        engine.forward(batches[:5])


def test_one_that_is_slow_time_after_time_is_named(workers: list[Worker]) -> None:
    heard: list[str] = []
    stragglers = Stragglers(heard.append, min_delay_s=0.1, times_late=3)
    group = WorkerGroup(workers, RemoteCalls([stragglers]))
    naps = {1: 0.4}
    for _ in range(3):
        assert heard == []
        group.run(lambda rank, handle: handle.nap.remote(naps.get(rank, 0.01)), phase="nap", timeout_s=30)
    (text,) = heard
    assert text.startswith(f"{workers[1]} is a straggler: it was late 3 times in a row")


def test_lost_processes_are_replaced_and_asked_again(
    cluster: Cluster, slots: list[WorkerSlot], mortals: list[Worker]
) -> None:
    losses = []

    def replace(lost: Sequence[Worker], error: RlhfError) -> list[Worker]:
        losses.append(str(error))
        cluster.kill(lost)
        return start_workers(cluster, slots[3:], Role.CRITIC)

    group = ReplaceableGroup(mortals, cluster.calls, replace)
    os.kill(mortals[1].pid, signal.SIGKILL)
    pids = group.run(lambda _rank, handle: handle.nap.remote(0), phase="nap", timeout_s=30)
    (loss,) = losses
    assert "nap: critic rank 1 (node 127.0.0.1" in loss
    assert " died." in loss
    assert pids == [worker.pid for worker in group.workers]
    assert not {worker.pid for worker in group.workers} & {worker.pid for worker in mortals}
    os.kill(group.workers[2].pid, signal.SIGSTOP)
    with pytest.raises(StallError, match="nap: no reply after 2 s"):
        group.run(lambda rank, handle: handle.nap.remote(3 if rank == 0 else 0), phase="nap", timeout_s=2)
    assert len(losses) == 2, "asked more than twice"
    cluster.kill(group.workers)


def test_what_was_lost_is_told_where_none_came_instead(cluster: Cluster, mortals: list[Worker]) -> None:
    def replace(_lost: Sequence[Worker], _error: RlhfError) -> list[Worker]:
        raise StallError("placement: critic waited 20 s")

    os.kill(mortals[1].pid, signal.SIGKILL)
    with pytest.raises(
        StallError, match=r"^nap: critic rank 1 .* died\. .* They could not be replaced: placement: critic waited"
    ):
        ReplaceableGroup(mortals, cluster.calls, replace).run(
            lambda _r, handle: handle.nap.remote(0), phase="nap", timeout_s=30
        )


def test_an_answer_that_is_an_error_replaces_nobody(cluster: Cluster, workers: list[Worker]) -> None:
    def replace(_lost: Sequence[Worker], _error: RlhfError) -> list[Worker]:
        raise AssertionError("replaced")

    with pytest.raises(RewardError):
        ReplaceableGroup(workers, cluster.calls, replace).run(
            lambda _r, handle: handle.fail.remote(), phase="x", timeout_s=30
        )


def test_a_pool_returns_rollouts_by_request(cluster: Cluster, workers: list[Worker]) -> None:
    pool = RolloutPool(WorkerGroup(workers, cluster.calls), generate_timeout_s=30, control_timeout_s=30)
    one = Sampling(max_tokens=1)
    requests = [
        RolloutRequest(
            id=f"p{n}/0", prompt_id=f"p{n}", prompt_token_ids=np.array([n]), seed=n, sampling=one,
        )
        for n in range(7)
    ]  # fmt: skip
    rollouts = generate(pool, requests)
    assert [rollout.id for rollout in rollouts] == [request.id for request in requests]
    assert {rollout.weight_version for rollout in rollouts} == {worker.pid for worker in workers}
    assert [rollout.id for rollout in generate(pool, requests[:1])] == ["p0/0"]


def test_the_client_names_every_engine_that_failed(workers: list[Worker], mortals: list[Worker]) -> None:
    client = RayEngineClient(workers)
    client.start_weight_update(30)
    assert client.finish_weight_update(3, "digest", 30) == {worker.name: "digest-3" for worker in workers}
    client = RayEngineClient(mortals)
    for worker in mortals[1:]:
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WeightSyncError, match=r"(?s)critic rank 1.*critic rank 2"):
        client.start_weight_update(30)


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
def test_an_engine_that_is_lost_in_a_sync_is_named_and_not_the_ranks_that_wait_for_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, workers: list[Worker], mortals: list[Worker], fault: int
) -> None:
    """Whether a rank fails first, or all wait."""
    os.kill((engine := mortals[1]).pid, fault)
    found = "is stopped (by SIGSTOP or a debugger)" if fault == signal.SIGSTOP else "is gone"
    psutil.wait_procs([psutil.Process(engine.pid)], timeout=10 if fault == signal.SIGKILL else 0)
    group = WorkerGroup(workers, cluster.calls)

    def sync(timeout_s: float, submit: Submit) -> str:
        with pytest.raises(StallError) as raised:
            group.run(submit, phase="sync", timeout_s=timeout_s, peers=mortals)
        assert str(raised.value).startswith(f"sync: no reply can come from {engine}. {engine.name} {found}.")
        return str(raised.value)

    assert "Meanwhile sync: policy rank 1" in sync(30, lambda rank, to: (to.nap, to.stumble, to.nap)[rank].remote(1))
    assert "Meanwhile sync: no reply after 0.5 s" in sync(0.5, lambda _rank, handle: handle.nap.remote(1))
    monkeypatch.setattr("rlhf.actors.waiting.POLL_EVERY_S", 0.3)
    sync(600 if fault == signal.SIGSTOP else 1, lambda _rank, handle: handle.nap.remote(2))
    with pytest.raises(RlhfError, match=r"^sync: policy rank . .* failed: ZeroDivisionError"):
        group.run(lambda _r, handle: handle.stumble.remote(), phase="sync", timeout_s=30, peers=[mortals[0]])


def test_a_cleared_cluster_starts_again(cluster: Cluster) -> None:
    """Also where a process obeys nobody: its devices and its name are free afterwards."""
    shape = Shape(num_nodes=1, num_devices_per_node=2)

    def start() -> list[Worker]:
        return start_workers(
            cluster, cluster.reserve(plan_placement({Role.REWARD: shape}, ()))[Role.REWARD], Role.REWARD
        )

    cluster.clear()  # the other tests' actors hold every core
    first = start()
    os.kill(first[1].pid, signal.SIGSTOP)
    refs = [worker.handle.nap.remote(600) for worker in first]
    with ThreadPoolExecutor() as pool:
        wait = pool.submit(cluster.calls.wait_all, [Call(worker=first[0], ref=refs[0])], phase="nap", timeout_s=900)
        cluster.clear()
        assert isinstance(wait.exception(timeout=60), WorkerLostError)
    assert not any(psutil.pid_exists(worker.pid) for worker in first)
    second = start()
    answers = cluster.calls.wait_all(
        [Call(worker=worker, ref=worker.handle.nap.remote(0)) for worker in second], phase="nap", timeout_s=60
    )
    assert answers == [worker.pid for worker in second]


def test_leaving_the_cluster_ends_every_wait(cluster: Cluster) -> None:
    """Or the thread would crash the process, or start a cluster of its own."""
    cluster.clear()
    shape = Shape(num_nodes=1, num_devices_per_node=2)
    slots = cluster.reserve(plan_placement({Role.CRITIC: shape}, ()))
    workers = start_workers(cluster, slots[Role.CRITIC], Role.CRITIC)
    refs = [worker.handle.nap.remote(600) for worker in workers]
    with ThreadPoolExecutor() as pool:
        waits = [
            pool.submit(cluster.calls.wait_all, [Call(worker=worker, ref=ref)], phase="nap", timeout_s=900)
            for worker, ref in zip(workers, refs, strict=True)
        ]
        cluster.close()
        assert not ray.is_initialized()
        assert all(isinstance(wait.exception(timeout=60), WorkerLostError) for wait in waits)
    with pytest.raises(WorkerLostError, match="nap: the run has left the cluster"):
        cluster.calls.wait_all([Call(worker=workers[0], ref=refs[0])], phase="nap", timeout_s=1)
    assert not ray.is_initialized()


def test_a_cluster_that_is_not_there_is_named() -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"ray: no cluster at 127.0.0.1:1 \(tried 3 times in 10 s\). Start one with"):
        Cluster(ClusterSection(address="127.0.0.1:1"), namespace="x")
    assert time.monotonic() - start < 20
