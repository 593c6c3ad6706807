"""Rollouts that run ahead of training: the bound, the versions, and what makes learning from them sound."""

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from rlhf.algorithms.grpo import GRPO
from rlhf.config.algo import Correction, GrpoSection, NoCorrection, RatioToSampler, TruncatedWeights
from rlhf.engines.fakes import FakeReward, FakeRollout, FakeTrainEngine, Table, log_softmax
from rlhf.types import Example, Experience, Head, Metrics, Role, Signal, Signals, SyncReport
from tests.unit.orchestrator.support import TOKENIZER, Run

pytestmark = pytest.mark.timeout(60)


class Remembering(FakeTrainEngine):
    """Keeps the weights of every version, and gives rollouts time to run ahead."""

    def __init__(self, rollout: FakeRollout, lr: float) -> None:
        super().__init__(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, num_ranks=2, rollout=rollout, lr=lr)
        self.versions: dict[int, Table] = {}

    def send_weights(self, version: int) -> SyncReport:
        self.versions[version] = self.table.copy()
        threading.Event().wait(0.02)
        return super().send_weights(version)


@dataclass(frozen=True)
class Credited:
    """What one step's credit was given, and what it gave."""

    example: Example
    signals: Signals
    experience: Experience


class Recording(GRPO):
    """GRPO that keeps what it saw, step by step."""

    def __init__(self, section: GrpoSection) -> None:
        super().__init__(section)
        self.steps: list[list[Credited]] = []
        self._experiences: list[Experience] = []

    def credit(self, examples: Sequence[Example], signals: Sequence[Signals]) -> tuple[list[Experience], Metrics]:
        experiences, metrics = super().credit(examples, signals)
        self._experiences = experiences
        return experiences, metrics

    def describe(self, examples: Sequence[Example], signals: Sequence[Signals]) -> Metrics:
        three = zip(examples, signals, self._experiences, strict=True)
        self.steps.append([Credited(*each) for each in three])
        return super().describe(examples, signals)


@dataclass
class Lagging:
    """A finished run of GRPO whose rollouts could run `max_lag` versions ahead."""

    path: Path
    max_lag: int
    correction: Correction = field(default_factory=TruncatedWeights)
    num_steps: int = 24
    lr: float = 2.0

    def run(self) -> tuple[list[Mapping[str, float]], Recording, Remembering]:
        rollout = FakeRollout(TOKENIZER.num_tokens)
        policy = Remembering(rollout, self.lr)
        algorithm = Recording(GrpoSection(scale="none", correction=self.correction))
        run = Run(self.path, algorithm, {Role.POLICY: policy}, rollout=rollout, rewards=FakeReward(scale=4.0))
        run = replace(
            run,
            num_steps=self.num_steps,
            max_lag=self.max_lag,
            group_size=4,
            batch_size=8,
            num_epochs=1,
            checkpoint_every=100,
            train=run.train.model_copy(update={"batch_size": 32}),
        )
        run.run()
        rows = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return rows, algorithm, policy


def of_answer(array: np.ndarray, example: Example) -> np.ndarray:
    return array[example.sequences[0].loss_mask]


@pytest.mark.parametrize("max_lag", [0, 1, 4])
def test_runs_that_lag_are_bounded_weighed_and_learn(tmp_path: Path, max_lag: int) -> None:
    """No response is older than allowed; the sampler's log-probs are those of the response's own version, the
    trainer's those of the newest; the loss gets both, and the advantage of the response."""
    rows, algorithm, policy = Lagging(tmp_path / "a", max_lag).run()
    assert max(row["rollout/lag_max"] for row in rows) == max_lag
    assert (max(row["mismatch/kl"] for row in rows) < 1e-9) == (max_lag == 0)
    assert rows[0]["reward/mean"] < 1.0
    assert np.mean([row["reward/mean"] for row in rows[-3:]]) > 3.0
    for step, credited in enumerate(algorithm.steps, start=1):
        for one in credited:
            version = one.example.weight_version
            assert version is not None
            assert 0 <= step - 1 - version <= max_lag
            tokens = of_answer(one.example.sequences[0].token_ids, one.example)
            behavior = log_softmax(policy.versions[version])[tokens]
            trainer = log_softmax(policy.versions[step - 1])[tokens]
            assert np.abs(of_answer(one.example.sampler_log_probs[0], one.example) - behavior).max() < 1e-5
            assert np.abs(of_answer(one.signals[Signal.OLD_LOG_PROBS][0], one.example) - trainer).max() < 1e-5
            group = [other.example.rewards[0] for other in credited if other.example.group == one.example.group]
            worth = one.example.rewards[0] - np.mean(group)
            (sequence,) = one.experience.sequences
            assert np.abs(of_answer(sequence.signals[Signal.ADVANTAGES], one.example) - worth).max() < 1e-4
            assert np.abs(of_answer(sequence.signals[Signal.SAMPLER_LOG_PROBS], one.example) - behavior).max() < 1e-5


def test_without_correction_the_mismatch_shows_the_lag(tmp_path: Path) -> None:
    rows, _, _ = Lagging(tmp_path / "a", 4, NoCorrection(), num_steps=12).run()
    assert max(row["mismatch/kl"] for row in rows) > 0.05
    assert max(row["mismatch/log_prob"] for row in rows) > 0.1
    assert max(row["mismatch/outside_band"] for row in rows) > 0.1
    assert not [name for row in rows for name in row if name.startswith("importance/")]


def test_against_the_sampler_the_ratio_itself_shows_the_lag(tmp_path: Path) -> None:
    """The trainer is asked nothing before it learns, and the old policy is the response's own version."""
    rows, algorithm, policy = Lagging(tmp_path / "a", 4, RatioToSampler()).run()
    assert np.mean([row["reward/mean"] for row in rows[-3:]]) > 3.0
    assert not [name for row in rows for name in row if name.startswith(("mismatch/", "importance/"))]
    assert max(row["policy/ratio_gap"] for row in rows if row["rollout/lag_max"] > 0) > 0.1
    for one in (one for credited in algorithm.steps for one in credited):
        assert Signal.OLD_LOG_PROBS not in one.signals
        (sequence,) = one.experience.sequences
        tokens = of_answer(sequence.token_ids, one.example)
        assert one.example.weight_version is not None
        behavior = log_softmax(policy.versions[one.example.weight_version])[tokens]
        assert np.abs(of_answer(sequence.signals[Signal.OLD_LOG_PROBS], one.example) - behavior).max() < 1e-5
