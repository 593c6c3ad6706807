"""The loop when something else fails: rewards that stay away, models that never answer, a disk that is full."""

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf.engines.base import PassReport
from rlhf.engines.fakes import FakeReward, FakeRollout, FakeTrainEngine
from rlhf.errors import CheckpointError, NumericsError, RewardError, StallError
from rlhf.orchestrator.evaluation import SampleEvaluator
from rlhf.orchestrator.step.sampler import Sampler
from rlhf.types import (
    FloatArray,
    Head,
    PackedTokens,
    Prompt,
    Reward,
    Role,
    Rollout,
    RolloutRequest,
    Sampling,
    TrainBatch,
)
from tests.unit.orchestrator.support import TOKENIZER, make_prompt, metrics_of, ppo_run, sft_run

pytestmark = pytest.mark.timeout(60)


class Outage(FakeReward):
    """Rewards that fail from the n-th call on."""

    def __init__(self, first_bad: int) -> None:
        super().__init__()
        self.left = first_bad

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        self.left -= 1
        if self.left < 0:
            raise RewardError("reward: connection refused; resume when it is up.")
        return super().score(prompts, responses, rollouts)


def test_a_reward_that_stays_away_saves_and_ends_the_run(tmp_path: Path) -> None:
    run = ppo_run(tmp_path / "a", rewards=Outage(3), checkpoint_every=100)
    with pytest.raises(RewardError, match=r"refused; resume when it is up\. Step 3 is saved"):
        run.run()
    assert (run.path / "checkpoints/step_3").is_dir()


def test_a_failed_evaluation_is_a_warning(tmp_path: Path) -> None:
    run = ppo_run(tmp_path / "a", num_steps=2)
    run.evaluator = SampleEvaluator(
        Sampler(run.rollout, Outage(0), TOKENIZER), [make_prompt(1)], Sampling(max_tokens=3), 0
    )
    run.run()
    assert "evaluation at step 2 failed: reward: connection refused" in run.out.getvalue()


class Unwritable(FakeTrainEngine):
    """Finds the disk full at the end."""

    def export(self, directory: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def test_a_model_that_cannot_be_written_is_written_by_the_next_attempt(tmp_path: Path) -> None:
    run = sft_run(tmp_path / "a", num_steps=2)
    run.engines[Role.POLICY] = Unwritable(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, num_ranks=2)
    with pytest.raises(CheckpointError, match=r"written: No space left on device\. Every step is saved; make room"):
        run.run()
    assert not (run.path / "model").exists()
    again = sft_run(tmp_path / "a", num_steps=2)
    again.run(resume=True)
    assert (run.path / "model").is_dir()


class Slow(FakeTrainEngine):
    """Never responses."""

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        threading.Event().wait(30)
        raise AssertionError

    def forward_backward(self, batches: Sequence[TrainBatch]) -> PassReport:
        threading.Event().wait(30)
        raise AssertionError


@pytest.mark.parametrize(
    ("make", "role", "phase"), [(ppo_run, Role.CRITIC, "log_probs"), (sft_run, Role.POLICY, "learn")]
)
def test_a_model_that_never_returns_is_named(tmp_path: Path, make: object, role: Role, phase: str) -> None:
    run = (ppo_run if make is ppo_run else sft_run)(tmp_path / "a")
    run.set_train(step_timeout_s=0.2)
    run.engines[role] = Slow(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS)
    waiting_for = "values" if phase == "log_probs" else "policy"
    with pytest.raises(StallError, match=rf"{phase}.*: the trainer waited .* s for .*{waiting_for}"):
        run.run()


class Drift(FakeRollout):
    """Reports log-probs that are off."""

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        return [replace(r, log_probs=r.log_probs - np.float32(0.5)) for r in super().generate(requests)]


def test_a_mismatch_of_sampler_and_trainer_warns_and_then_ends_the_run(tmp_path: Path) -> None:
    for mismatch_stop, fails in ((0.0, False), (0.4, True)):
        run = ppo_run(tmp_path / str(fails), num_steps=2)
        run.set_train(mismatch_warn=0.1, mismatch_stop=mismatch_stop)
        run.rollout = Drift(TOKENIZER.num_tokens)
        run.engines[Role.POLICY] = FakeTrainEngine(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, rollout=run.rollout)
        if fails:
            with pytest.raises(NumericsError, match=r"differ by 0\.5 nats a token"):
                run.run()
        else:
            run.run()
            assert metrics_of(run)[0]["mismatch/log_prob"] == pytest.approx(0.5)
            assert run.out.getvalue().count("differ by") == 1


def test_a_run_that_cannot_be_saved_does_not_learn_first(tmp_path: Path) -> None:
    class Broken(FakeTrainEngine):
        def save(self, directory: Path) -> None:
            raise OSError(28, "No space left on device")

    run = sft_run(tmp_path / "a")
    run.engines[Role.POLICY] = Broken(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS)
    with pytest.raises(OSError, match="No space left on device"):
        run.run()
    assert run.engines[Role.POLICY].num_steps == 0
