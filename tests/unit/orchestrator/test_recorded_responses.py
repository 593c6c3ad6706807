"""Which responses a run records, with which advantages."""

import json
from pathlib import Path

import numpy as np

from rlhf.algorithms.grpo import GRPO
from rlhf.config.algo import GrpoSection
from rlhf.engines.fakes import FakeReward
from rlhf.orchestrator.evaluation import SampleEvaluator
from rlhf.orchestrator.step.sampler import Sampler
from rlhf.types import Json, Sampling
from tests.unit.orchestrator.support import TOKENIZER, make_prompt, ppo_run


def rows_of(file: Path) -> list[dict[str, Json]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_group_of_a_step_is_recorded_with_its_advantages(tmp_path: Path) -> None:
    """By GRPO's definition: (reward - mean) / std of the group."""
    run = ppo_run(tmp_path / "a", num_steps=2, group_size=4)
    run.algorithm = GRPO(GrpoSection())
    run.engines = {role: engine for role, engine in run.engines.items() if role in run.algorithm.needs.trains}
    run.run()
    rows = rows_of(run.path / "rollouts/step_000002.jsonl")
    assert [row["group"] for row in rows] == [number for number in range(4) for _ in range(4)]
    for number in range(4):
        rewards = np.array([row["reward"] for row in rows if row["group"] == number], dtype=np.float64)
        advantages = np.array([row["advantage"] for row in rows if row["group"] == number], dtype=np.float64)
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=0) + 1e-6)
        np.testing.assert_allclose(advantages, expected, atol=1e-3)
    assert not (run.path / "evaluations").exists()


def test_the_responses_of_an_evaluation_are_recorded_at_its_step(tmp_path: Path) -> None:
    run = ppo_run(tmp_path / "a", num_steps=3, evaluate_every=2)
    sampler = Sampler(run.rollout, FakeReward(), TOKENIZER)
    run.evaluator = SampleEvaluator(sampler, [make_prompt(i) for i in range(3)], Sampling(max_tokens=4), 1)
    run.run()
    files = sorted((run.path / "evaluations").iterdir())
    assert [file.name for file in files] == ["step_000002.jsonl", "step_000003.jsonl"]
    rows = rows_of(files[0])
    assert [row["prompt_id"] for row in rows] == ["p0", "p1", "p2"]
    assert all(row["step"] == 2 and row["weight_version"] == 2 and row["advantage"] is None for row in rows)
    of_file = [row["eval/reward"] for row in rows_of(run.path / "metrics.jsonl") if row["step"] == 2]
    assert np.mean([float(str(row["reward"])) for row in rows]) == of_file[0]
