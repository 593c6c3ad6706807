"""Rollouts that run ahead: with groups that are sampled again, a stop in the middle, and a resume."""

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from rlhf.engines.fakes import FakeRollout, FakeTrainEngine
from rlhf.errors import PreemptedError
from rlhf.orchestrator.data.order import Order
from rlhf.orchestrator.evaluation import Evaluation
from rlhf.types import Head, Role, Rollout, RolloutRequest, ScoredGroup, SyncReport
from tests.unit.orchestrator.support import TOKENIZER, Run, make_prompt, ppo_run

pytestmark = pytest.mark.timeout(60)

DROPPED = {"p2", "p5"}
"""Prompts whose groups are never kept, so that every step samples again."""
NUM_STEPS = 9


class Slow(FakeTrainEngine):
    """Takes its time over a sync, so that rollouts run ahead; asks for a stop when it sends `stop_at`."""

    def __init__(self, run: Run, stop_at: int) -> None:
        super().__init__(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, num_ranks=2, rollout=run.rollout)
        self._run = run
        self._stop_at = stop_at

    def send_weights(self, version: int) -> SyncReport:
        threading.Event().wait(0.01)
        if version == self._stop_at:
            self._run.stop.request()
        return super().send_weights(version)


class Counting(FakeRollout):
    """Notes the steps that responses were requested, in order."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER.num_tokens)
        self.steps: list[int] = []

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        self.steps.append(int(requests[0].id.split("/")[0]))
        return super().generate(requests)


def keep(group: ScoredGroup) -> bool:
    return group.prompt.id not in DROPPED


def ahead(path: Path, max_lag: int, *, stop_at: int = -1) -> Run:
    run = ppo_run(path, num_steps=NUM_STEPS, max_lag=max_lag, checkpoint_every=100, keep_group=keep)
    run.rollout = Counting()
    run.engines[Role.POLICY] = Slow(run, stop_at)
    return run


def rows_of(run: Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def prompts_of(run: Run) -> list[list[str]]:
    """The prompts that each step trained on."""
    steps = []
    for file in sorted((run.path / "rollouts").iterdir()):
        answers = [json.loads(line)["prompt_id"] for line in file.read_text().splitlines()]
        steps.append(answers[:: run.group_size])
    return steps


def kept_prompts(run: Run) -> list[list[str]]:
    """What each step is to train on, whatever the timing: the next rows whose groups are kept."""
    order = Order([make_prompt(i) for i in range(run.num_prompts)], seed=3)
    steps = []
    for _ in range(NUM_STEPS):
        kept: list[str] = []
        while len(kept) < run.batch_size:
            kept += [p.id for p in order.take(run.batch_size - len(kept)) if p.id not in DROPPED]
        steps.append(kept)
    return steps


@pytest.mark.parametrize("max_lag", [1, 4])
def test_groups_are_sampled_again_within_the_bound(tmp_path: Path, max_lag: int) -> None:
    run = ahead(tmp_path / "a", max_lag)
    run.run()
    lags = [row["rollout/lag_max"] for row in rows_of(run)]
    assert 1 <= max(lags) <= max_lag
    assert sum(row["rollout/groups_dropped"] for row in rows_of(run)) > 0
    assert prompts_of(run) == kept_prompts(run)


@pytest.mark.parametrize(("max_lag", "stop_at"), [(1, 5), (4, 3)])
def test_a_stop_forgets_what_ran_ahead_and_a_resume_draws_it_anew(tmp_path: Path, max_lag: int, stop_at: int) -> None:
    """What was sampled ahead is lost with the process. Its prompts come again, answered by the checkpoint's weights:
    no row is skipped, none is trained on twice, and the first step is on-policy."""
    cut = ahead(tmp_path / "a", max_lag, stop_at=stop_at)
    with pytest.raises(PreemptedError):
        cut.run()
    assert isinstance(cut.rollout, Counting)
    assert max(cut.rollout.steps) > stop_at  # rollouts had run ahead of what was saved
    resumed = ahead(tmp_path / "a", max_lag)
    resumed.run(resume=True)
    assert isinstance(resumed.rollout, Counting)
    assert resumed.rollout.steps[0] == stop_at + 1
    rows = rows_of(resumed)
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert rows[stop_at]["rollout/lag_max"] == 0
    assert max(row["rollout/lag_max"] for row in rows) <= max_lag
    assert prompts_of(resumed) == kept_prompts(resumed)


@pytest.mark.parametrize(("takes_turns", "order"), [(False, ["release", "evaluate"]), (True, ["evaluate", "release"])])
def test_on_shared_devices_the_next_rollouts_wait_for_an_evaluation(
    tmp_path: Path, takes_turns: bool, order: list[str]
) -> None:
    """Its reward model computes there, and plans count no awake engine beside it."""
    events: list[str] = []

    class Evaluating:
        def evaluate(self, version: int) -> Evaluation:
            events.append("evaluate")
            return Evaluation()

    run = ppo_run(tmp_path / "a", num_steps=2, evaluate_every=1, evaluator=Evaluating(), takes_turns=takes_turns)
    run.source = source = run.make_source()
    release = source.release

    def noted() -> None:
        events.append("release")
        release()

    source.release = noted  # type: ignore[method-assign]
    run.run()
    assert events == order * 2
