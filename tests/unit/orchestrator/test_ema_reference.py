"""A reference that follows the policy: when it moves, what it then is, and that a resume forgets nothing."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlhf.algorithms.online_dpo import OnlineDPO
from rlhf.config.algo import OnlineDpoSection
from rlhf.engines.fakes import FakeRollout, FakeTrainEngine, Table
from rlhf.types import Head, Role, SyncReport
from tests.unit.orchestrator.support import TOKENIZER, Run, ppo_run

pytestmark = pytest.mark.timeout(60)


class Remembering(FakeTrainEngine):
    """Keeps what it sent, version by version, and what the reference was then."""

    def __init__(self, rollout: FakeRollout, lr: float = 0.5) -> None:
        super().__init__(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, num_ranks=2, lr=lr, rollout=rollout)
        self.sent: list[Table] = []
        self.copies: list[Table] = []

    def send_weights(self, version: int) -> SyncReport:
        self.sent.append(self.table.copy())
        self.copies.append(self.copy.copy())
        return super().send_weights(version)


def following_run(path: Path, section: OnlineDpoSection, *, lr: float = 0.5, num_steps: int = 6) -> Run:
    run = ppo_run(path, num_steps=num_steps, checkpoint_every=2)
    run.algorithm = OnlineDPO(section)
    run.engines = {Role.POLICY: Remembering(run.rollout, lr)}
    return run


def policy_of(run: Run) -> Remembering:
    engine = run.engines[Role.POLICY]
    assert isinstance(engine, Remembering)
    return engine


def metrics_of(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def test_a_running_mean_is_that_of_the_policys_versions(tmp_path: Path) -> None:
    run = following_run(tmp_path / "a", OnlineDpoSection(reference="ema", reference_decay=0.75))
    run.run()
    engine = policy_of(run)
    mean, distances = engine.sent[0], []
    for table in engine.sent[1:]:
        distances.append(0.25 * float(np.linalg.norm(table - mean)))
        mean = 0.75 * mean + 0.25 * table
    np.testing.assert_allclose(engine.copy, mean, rtol=1e-12)
    rows = metrics_of(run)
    assert [row["reference/version"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["reference/moved"] for row in rows] == pytest.approx(distances)


def test_a_refresh_comes_when_it_is_due_and_is_the_policy(tmp_path: Path) -> None:
    run = following_run(tmp_path / "a", OnlineDpoSection(reference="refresh", reference_every_steps=3))
    run.run()
    engine = policy_of(run)
    of_version = [0, 0, 0, 0, 3, 3, 3]  # when version n is sent, the refresh of step n is still to come
    assert all((copy == engine.sent[version]).all() for copy, version in zip(engine.copies, of_version, strict=True))
    assert (engine.copy == engine.table).all()
    assert [row.get("reference/version") for row in metrics_of(run)] == [None, None, 3, None, None, 6]


def test_a_resumed_run_has_the_reference_that_it_had(tmp_path: Path) -> None:
    section = OnlineDpoSection(reference="ema", reference_decay=0.9)
    whole = following_run(tmp_path / "whole", section)
    whole.run()
    following_run(tmp_path / "cut", section, num_steps=4).run()
    resumed = following_run(tmp_path / "cut", section)
    resumed.run(resume=True)
    assert (policy_of(resumed).copy == policy_of(whole).copy).all()
    assert (policy_of(resumed).table == policy_of(whole).table).all()
    assert not (policy_of(whole).copy == policy_of(whole).table).all()


def test_a_reference_that_should_move_and_does_not_is_a_warning(tmp_path: Path) -> None:
    run = following_run(tmp_path / "a", OnlineDpoSection(reference="ema"), lr=0.0, num_steps=1)
    run.run()
    assert "step 1: the reference was updated from the policy, and did not move" in run.out.getvalue()
