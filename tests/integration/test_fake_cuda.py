"""Placement, weight sync, sleep mode and plans on clusters of GPUs, with CUDA's, NCCL's and Ray's rules as fakes.

What must not be broken is broken on purpose: then a run fails with an error that says what.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from rlhf.actors.actor import Actor
from rlhf.actors.calls import with_parts
from rlhf.actors.colocated import SleepMode, WakeForSync
from rlhf.actors.launcher import Launcher
from rlhf.actors.probed import ProbedPolicy
from rlhf.errors import RlhfError, WeightSyncError
from rlhf.types import Role
from tests.integration.rollout_support import HAS_VLLM, IGNORE_VLLM_IMPORT_WARNINGS

if not HAS_VLLM:
    pytest.skip("vllm is not installed", allow_module_level=True)

with warnings.catch_warnings(action="ignore"):  # importing vLLM warns
    from vllm.distributed.weight_transfer import ipc_engine

    from rlhf.engines.training.optimizer_swap import OptimizerSwap
    from rlhf.engines.weight_sync.vllm_sender import DigestingSource
    from tests.fake_cuda import run as fake_run
    from tests.fake_cuda.fake_ray import NOSET
    from tests.fake_cuda.machine import SleepPool, current
    from tests.fake_cuda.models import ShardedPolicy
    from tests.fake_cuda.run import Run, Shape, started

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    *IGNORE_VLLM_IMPORT_WARNINGS,
]

ONE = Shape(num_nodes=1, num_gpus=1, width=1)
EIGHT = Shape(num_nodes=1, num_gpus=8, width=2)
TWO_NODES = Shape(num_nodes=2, num_gpus=8, width=1)
APART = Shape(num_nodes=2, num_gpus=8, width=4, colocated=False)
LARGE = Shape(num_nodes=16, num_gpus=8, width=8)
LARGE_APART = Shape(num_nodes=16, num_gpus=8, width=8, colocated=False)
OVER_NODES = Shape(num_nodes=2, num_gpus=8, width=16, nodes_per_engine=2)
OVER_NODES_SIDE_BY_SIDE = Shape(num_nodes=2, num_gpus=8, width=8, nodes_per_engine=2)
OVER_NODES_APART = Shape(num_nodes=4, num_gpus=8, width=8, nodes_per_engine=2, colocated=False)
STAGES = Shape(num_nodes=1, num_gpus=8, width=4, stages=2)
STAGES_APART = Shape(num_nodes=4, num_gpus=8, width=8, nodes_per_engine=2, stages=2, colocated=False)
SHAPES = {
    "1": ONE,
    "8": EIGHT,
    "2x8": TWO_NODES,
    "2x8-apart": APART,
    "16x8": LARGE,
    "16x8-apart": LARGE_APART,
    "2x8-over-nodes": OVER_NODES,
    "2x8-over-nodes-side-by-side": OVER_NODES_SIDE_BY_SIDE,
    "4x8-over-nodes-apart": OVER_NODES_APART,
    "8-stages": STAGES,
    "4x8-stages-apart": STAGES_APART,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("policy")


def steps(run: Run, num_steps: int) -> Iterator[int]:
    """The versions of a few steps, each of which fills the GPUs as planned."""
    run.policy.send_weights(0)
    for version in range(1, num_steps + 1):
        with run.phase("generate"):
            rollouts = run.generate()
        assert {rollout.weight_version for rollout in rollouts} == {version - 1}
        with run.phase("learn"):
            run.learn()
        with run.phase("sync"):
            run.policy.send_weights(version)
        yield version


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_steps_move_weights_and_fill_the_gpus_as_planned(
    shape: Shape, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with started(shape, folder, monkeypatch) as run:
        require_planned_bundles(run, shape.width // shape.nodes_per_engine)
        said, used = [], []
        for _ in steps(run, 3 if shape.num_nodes < 16 else 1):
            said.append({float(log_prob) for rollout in run.generate() for log_prob in rollout.log_probs})
            used.append([gpu.used for gpu in run.gpus])
        assert all(len(values) == 1 for values in said), "engines have different weights"
        assert len({next(iter(values)) for values in said}) == len(said), "the weights did not change"
        assert all(now == used[0] for now in used), "a step leaves memory behind"


def require_planned_bundles(run: Run, width: int) -> None:
    """As many devices of each group on each node as the plan says, whichever node that is."""
    for group in run.plan.groups:
        planned: Counter[int] = Counter()
        for bundle in group.bundles:
            planned[bundle.node] += bundle.num_devices
        is_engines = group.group.roles == (Role.ROLLOUT,)
        assert run.workers.engines is not None
        engines = with_parts(run.workers.engines.workers)
        workers = engines if is_engines else run.workers.groups[Role.POLICY].workers
        placed = Counter(worker.node_id for worker in workers for _ in range(width if is_engines else 1))
        assert sorted(placed.values()) == sorted(planned.values())


@pytest.mark.parametrize("shape", [ONE, EIGHT, TWO_NODES], ids=["1", "8", "2x8"])
def test_optimizer_states_are_on_the_gpu_in_the_step_alone(
    shape: Shape, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between steps, the host has them and the weights of sleeping engines, as planned."""
    with started(shape, folder, monkeypatch, flags=("--policy.swap-optimizer",)) as run:
        for _ in steps(run, 2):
            run.generate()
            for index, node in enumerate(run.nodes):
                assert node.host_bytes == pytest.approx(run.plan.host_bytes(index), rel=1e-6)


@pytest.mark.parametrize("environ", [{}, {NOSET: "1"}], ids=["ray-sets-devices", "ray-leaves-devices"])
@pytest.mark.parametrize("shape", [EIGHT, TWO_NODES, APART, OVER_NODES], ids=["8", "2x8", "2x8-apart", "over-nodes"])
def test_every_rank_has_a_gpu_and_every_engine_those_of_its_ranks(
    shape: Shape, environ: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not Ray sets CUDA_VISIBLE_DEVICES."""
    with started(shape, folder, monkeypatch, environ=environ) as run:
        assert run.workers.engines is not None
        ranks = [worker.handle._actor.process for worker in run.workers.groups[Role.POLICY].workers]
        engines = [worker.handle._actor.process for worker in with_parts(run.workers.engines.workers)]
        of_ranks = [process.devices[0] for process in ranks]
        assert all(len(process.devices) == 1 for process in ranks)
        assert len(set(of_ranks)) == len(ranks)
        of_engines = [gpu for process in engines for gpu in process.devices]
        assert {len(process.devices) for process in engines} == {shape.width // shape.nodes_per_engine}
        assert len(set(of_engines)) == len(of_engines)
        if shape.colocated:
            assert of_engines == of_ranks
        else:
            assert not set(of_engines) & set(of_ranks)


class TestBroken:
    """Each breaks one rule on purpose."""

    def test_ranks_that_rely_on_ray_for_their_device(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Actor, "see_gpus", lambda _self, _gpus: None)
        with (
            pytest.raises(RlhfError, match=r"Duplicate GPU detected: ranks \[0, 1, .*\] both on GPU-node0-0"),
            started(EIGHT, folder, monkeypatch, environ={NOSET: "1"}),
        ):
            pass

    def test_engines_that_are_not_told_their_gpus(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            Launcher, "_shared_gpus", lambda self, _: [()] * len(self._placement.group_of(Role.ROLLOUT).engine_parts)
        )
        with (
            pytest.raises(RlhfError, match=r"invalid device ordinal 0 in rollout engine .*, which sees 0"),
            started(EIGHT, folder, monkeypatch),
        ):
            pass

    @pytest.mark.parametrize("shape", [EIGHT, APART], ids=["ipc", "nccl"])
    def test_a_rank_that_walks_the_buckets_in_another_order(
        self, shape: Shape, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        walk = DigestingSource.__iter__

        def reversed_on_one(self: DigestingSource) -> Iterator[Any]:
            process = current()
            if process is not None and process.rank == 1:
                self.buckets = self.buckets[::-1]
            return walk(self)

        monkeypatch.setattr(DigestingSource, "__iter__", reversed_on_one)
        monkeypatch.setattr(fake_run, "COLLECTIVE_TIMEOUT_S", 3.0)
        with (
            started(shape, folder, monkeypatch) as run,
            pytest.raises(RlhfError, match=r"ranks make different calls: .*\(rank 0, 2, .*\); .*\(rank 1\)"),
        ):
            run.policy.send_weights(0)

    @pytest.mark.parametrize("shape", [EIGHT, APART], ids=["ipc", "nccl"])
    def test_a_rank_that_takes_no_part(self, shape: Shape, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        send = ShardedPolicy.send_weights
        monkeypatch.setattr(fake_run, "COLLECTIVE_TIMEOUT_S", 3.0)
        monkeypatch.setattr(
            ShardedPolicy,
            "send_weights",
            lambda self, version: None if self._process.rank == 1 else send(self, version),
        )
        with (
            started(shape, folder, monkeypatch) as run,
            pytest.raises(RlhfError, match=r"all_gather of .*: not all came in 3 s; .* join \(rank 1\)"),
        ):
            run.policy.send_weights(0)

    def test_a_buffer_that_is_freed_before_it_is_read(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A handle keeps nothing alive: the sender's buffer must live until every engine has read it."""
        produce = ipc_engine.packed_ipc_producer
        monkeypatch.setattr(ipc_engine, "packed_ipc_producer", lambda **arguments: iter(list(produce(**arguments))))
        with (
            started(EIGHT, folder, monkeypatch) as run,
            pytest.raises(WeightSyncError, match=r"invalid IPC handle .*: its owner has freed the memory"),
        ):
            run.policy.send_weights(0)

    def test_a_buffer_that_is_filled_again_before_it_is_read(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All chunks of a sync use one buffer."""
        produce = ipc_engine.packed_ipc_producer

        def ahead(**arguments: Any) -> Iterator[Any]:
            """Each chunk after the next one has been written."""
            before = None
            for chunk in produce(**arguments):
                if before is not None:
                    yield before
                before = chunk
            yield before

        monkeypatch.setattr(ipc_engine, "packed_ipc_producer", ahead)
        with (
            started(EIGHT, folder, monkeypatch) as run,
            pytest.raises(WeightSyncError, match=r"version 0: received \w+, need \w+"),
        ):
            run.policy.send_weights(0)

    def test_engines_that_wake_whole_before_a_sync(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def send(self: WakeForSync, version: int, engines: Any) -> Any:
            self._pool(self._engines).wake()
            return ProbedPolicy._send_weights(self, version, engines)

        monkeypatch.setattr(WakeForSync, "_send_weights", send)
        with started(EIGHT, folder, monkeypatch) as run, pytest.raises(AssertionError, match="'sync'"):
            list(steps(run, 1))

    def test_engines_that_stay_awake(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(SleepMode, "awake", nullcontext)
        with started(EIGHT, folder, monkeypatch) as run, pytest.raises(AssertionError, match="'learn'"):
            list(steps(run, 1))

    def test_a_sleep_that_releases_nothing(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(SleepPool, "suspend", lambda _self, on_host: None)
        with started(EIGHT, folder, monkeypatch) as run, pytest.raises(AssertionError, match="'learn'"):
            list(steps(run, 1))

    def test_models_that_keep_their_free_memory(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("rlhf.engines.process.device_memory.empty_cache", lambda: None)
        with started(EIGHT, folder, monkeypatch) as run, pytest.raises(AssertionError, match="'sync'"):
            list(steps(run, 1))

    def test_optimizer_states_that_stay_on_the_gpu(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(OptimizerSwap, "_to_host", lambda _self: None)
        swap = ("--policy.swap-optimizer",)
        with (
            started(EIGHT, folder, monkeypatch, flags=swap) as run,
            pytest.raises(AssertionError, match="'generate'"),
        ):
            list(steps(run, 1))
