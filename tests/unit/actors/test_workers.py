"""What an actor does before its engine does anything."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf.actors.ranks import Rank, RankActor
from rlhf.actors.rollout_workers import RolloutWorker
from rlhf.config.rollout import RolloutSection
from rlhf.engines.rollout.spec import EngineSpec

SPEC = EngineSpec(
    section=RolloutSection(), model="m", dtype="float32", device="cuda", seed=0, sync_backend="ipc", reference=None
)


@pytest.mark.parametrize(("gpus", "seen"), [((), "6,1"), (("3",), "3"), (("2", "5"), "2,5")])
def test_an_engine_sees_the_gpus_that_it_is_told_else_its_own(
    gpus: Sequence[str], seen: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """When its library is imported: not later. Whatever the node says: Ray may be told to set nothing."""
    found: list[str] = []
    monkeypatch.chdir(tmp_path)  # where the actor goes; and back
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setattr(RolloutWorker, "gpus", lambda _self: ["6", "1"])
    monkeypatch.setattr("rlhf.actors.engine_parts.node_address", lambda: "127.0.0.1")
    monkeypatch.setattr("rlhf.engines.process.rendezvous.bind_collectives", lambda _address: None)
    monkeypatch.setattr(
        "rlhf.actors.rollout_workers.open_engine", lambda *_, **__: found.append(os.environ["CUDA_VISIBLE_DEVICES"])
    )
    RolloutWorker(tmp_path, None).start(SPEC, "rollout engine 0", gpus)
    assert found == [seen]
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ


@pytest.mark.parametrize(("device", "seen"), [("cuda", "5"), ("cpu", "0,1,2,3")])
def test_a_rank_sees_its_own_gpu_alone(device: str, seen: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr(RankActor, "gpus", lambda _self: ["5"])
    monkeypatch.setattr("rlhf.actors.ranks.node_address", lambda: "127.0.0.1")
    monkeypatch.setattr("rlhf.engines.process.rendezvous.bind_collectives", lambda _address: None)
    monkeypatch.setattr("rlhf.engines.process.rendezvous.open_store", lambda *_: None)
    monkeypatch.setattr(
        "rlhf.engines.process.distributed.init_distributed",
        lambda *_, **__: found.append(os.environ["CUDA_VISIBLE_DEVICES"]),
    )
    rank = Rank(rank=1, world_size=2, master_address="127.0.0.1", master_port=1, device=device, timeout_s=1.0)
    RankActor(tmp_path, None).join(rank)
    assert found == [seen]
