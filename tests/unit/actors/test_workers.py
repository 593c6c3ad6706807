"""What an actor does before its engine does anything."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from rlhf.actors.workers import RolloutWorker
from rlhf.config.rollout import RolloutSection
from rlhf.engines.rollout.spec import EngineSpec

SPEC = EngineSpec(
    section=RolloutSection(), model="m", dtype="float32", device="cuda", seed=0, sync_backend="ipc", reference=None
)


@pytest.mark.parametrize(("gpus", "seen"), [((), "7"), (("3",), "3"), (("2", "5"), "2,5")])
def test_an_engine_sees_the_gpus_that_it_is_told(
    gpus: Sequence[str], seen: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """When its library is imported: not later."""
    found: list[str] = []
    monkeypatch.chdir(tmp_path)  # where the actor goes; and back
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr("rlhf.actors.workers.node_address", lambda: "127.0.0.1")
    monkeypatch.setattr("rlhf.engines.process.rendezvous.bind_collectives", lambda _address: None)
    monkeypatch.setattr(
        "rlhf.actors.workers.open_engine", lambda *_, **__: found.append(os.environ["CUDA_VISIBLE_DEVICES"])
    )
    RolloutWorker(tmp_path, None).start(SPEC, "rollout engine 0", gpus)
    assert found == [seen]
