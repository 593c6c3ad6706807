"""Files of a checkpoint are flushed, hashed and verified at the same time."""

import threading
from pathlib import Path

import numpy as np
import pytest

from rlhf.engines.fakes import FakeTrainEngine
from rlhf.orchestrator.run import checkpoint
from rlhf.orchestrator.run.checkpoint import Checkpoints, RunState, sha256_of
from rlhf.types import Head, Role


def test_files_are_hashed_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_three = threading.Barrier(3)  # the policy's file, the critic's and the state

    def hashed(path: Path) -> str:
        all_three.wait(60)
        return sha256_of(path)

    monkeypatch.setattr(checkpoint, "sha256_of", hashed)
    engines = {
        Role.POLICY: FakeTrainEngine(np.zeros(4), Head.LOG_PROBS),
        Role.CRITIC: FakeTrainEngine(np.zeros(4), Head.VALUES),
    }
    saved = Checkpoints(tmp_path, keep=2, warn=pytest.fail, repaired=lambda _: None)
    assert saved.save(RunState(step=1, seed=0), engines).name == "step_1"
