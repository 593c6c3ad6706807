"""Which runs fork their workers from a server that is started ahead."""

import os
import sys
from pathlib import Path

import pytest

from rlhf.actors.forked_worker import FOLDER
from rlhf.config.loading.load import load_config
from rlhf.config.run import ClusterSection
from rlhf.launch import fork_ahead
from rlhf.launch.fork_ahead import forking_ahead, starts_cpu_cluster, worker_environment
from rlhf.planning.placement import Shape, plan_placement
from rlhf.types import Role

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has descriptors of processes")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(fork_ahead, "local_gpus", list)


@pytest.mark.parametrize(
    ("section", "gpus", "starts"),
    [
        (ClusterSection(), [], True),
        (ClusterSection(), ["H100"], False),
        (ClusterSection(device="cpu"), ["H100"], True),
        (ClusterSection(device="cuda"), [], False),
        (ClusterSection(fork_workers=False), [], False),
        (ClusterSection(address="10.0.0.1:6379"), [], False),
    ],
)
def test_a_run_that_starts_a_cluster_on_cpus(
    section: ClusterSection, gpus: list[str], starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork_ahead, "local_gpus", lambda: gpus)
    assert starts_cpu_cluster(section) is starts


def test_a_run_that_joins_a_cluster_by_a_variable_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not starts_cpu_cluster(ClusterSection())


def test_workers_have_the_variables_of_the_driver_and_those_of_models() -> None:
    placement = plan_placement({Role.POLICY: Shape(num_nodes=1, num_devices_per_node=1)}, ())
    environ = worker_environment(placement, {"PATH": "/bin", "OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": "5"})
    assert environ == {"PATH": "/bin", "OMP_NUM_THREADS": "3", "GOMP_SPINCOUNT": "5", "DS_ACCELERATOR": "cpu"}


def test_the_server_and_what_names_it_go_with_the_run() -> None:
    config = load_config("sft", ["--policy.model", "org/model", "--data.path", "none.jsonl"])
    with forking_ahead(config):
        folder = os.environ[FOLDER]
        assert Path(folder).is_dir()
    assert FOLDER not in os.environ
    assert not Path(folder).exists()
