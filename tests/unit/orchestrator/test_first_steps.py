"""A run says in its first steps what keeps it from learning."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf.algorithms.grpo import GRPO
from rlhf.config.algo import GrpoSection
from rlhf.engines.base import RewardSource
from rlhf.engines.fakes import FakeReward, FakeRollout, FakeTrainEngine
from rlhf.types import FinishReason, Head, Prompt, Reward, Role, Rollout, RolloutRequest
from tests.unit.orchestrator.support import TOKENIZER, Run, sft_run

pytestmark = pytest.mark.timeout(60)


def test_parameters_that_do_not_move_are_counted_and_the_cause_is_named(tmp_path: Path) -> None:
    run = sft_run(tmp_path / "a")
    run.engines[Role.POLICY] = FakeTrainEngine(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, lr=0.0)
    run.run()
    shown = run.out.getvalue()
    assert "unmoved: policy: 1 of its parameters did not change in the first update (events.jsonl names them)" in shown
    assert "table" not in shown, "a model has hundreds of names"
    assert shown.count("diagnosis: after step 1: the learning rate of the policy is 0 because") == 1
    events = [json.loads(line) for line in (tmp_path / "a" / "events.jsonl").read_text().splitlines()]
    assert [event["parameters"] for event in events if event["kind"] == "unmoved"] == [["table"]]


class NeverEnds(FakeRollout):
    """Responses without a stop token: each is cut at the limit."""

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        cut = []
        for request, rollout in zip(requests, super().generate(requests), strict=True):
            tokens = np.random.default_rng(request.seed).integers(2, TOKENIZER.num_tokens, request.sampling.max_tokens)
            log_probs = np.full(len(tokens), -np.log(TOKENIZER.num_tokens), dtype=np.float32)
            cut.append(replace(rollout, token_ids=tokens, log_probs=log_probs, finish_reason=FinishReason.LENGTH))
        return cut


class OfThePrompt(FakeReward):
    """The same reward for all responses to a prompt; other prompts have others."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        return [Reward(total=float(prompt.token_ids.sum() + len(prompt.id))) for prompt in prompts]


class Never(FakeReward):
    """0 for every response."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        return [Reward(total=0.0, parts={"exact": 0.0}) for _ in prompts]


def grpo_run(path: Path, rollout: FakeRollout, rewards: RewardSource, lr: float) -> Run:
    engine = FakeTrainEngine(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, lr=lr, rollout=rollout)
    run = Run(path, GRPO(GrpoSection()), {Role.POLICY: engine}, rollout=rollout, rewards=rewards, group_size=4)
    run.num_steps = 3
    return run


@pytest.mark.parametrize(
    ("rollout", "rewards", "lr", "causes"),
    [
        (NeverEnds, FakeReward, 0.1, ["all responses were cut at"]),
        (NeverEnds, Never, 0.1, ["all responses were cut at"]),
        (FakeRollout, OfThePrompt, 0.1, ["all responses to the same prompt have the same reward"]),
        (FakeRollout, Never, 0.1, ["no row has a label and every reward is 0, so that all advantages are 0"]),
        (FakeRollout, FakeReward, 1e-12, ["the learning rate of the policy is 1e-12 because"]),
        (NeverEnds, FakeReward, 1e-12, ["all responses were cut at", "the learning rate of the policy is 1e-12"]),
    ],
)
def test_the_first_steps_name_the_cause_on_screen_and_in_the_events(
    rollout: type[FakeRollout], rewards: type[FakeReward], lr: float, causes: list[str], tmp_path: Path
) -> None:
    run = grpo_run(tmp_path / "a", rollout(TOKENIZER.num_tokens), rewards(), lr)
    run.run()
    events = [json.loads(line) for line in (tmp_path / "a" / "events.jsonl").read_text().splitlines()]
    said = [event["text"] for event in events if event["kind"] == "diagnosis"]
    assert len(said) == len(causes), said
    shown = run.out.getvalue()
    for text, cause in zip(said, causes, strict=True):
        assert text.startswith(f"after step 1: {cause}"), text
        assert shown.count(f"diagnosis: {text}") == 1
    assert "unmoved: " not in shown, "without a gradient nothing moves, which is no cause"


def test_a_run_that_learns_is_told_nothing(tmp_path: Path) -> None:
    run = grpo_run(tmp_path / "a", FakeRollout(TOKENIZER.num_tokens), FakeReward(), 0.1)
    run.run()
    assert "diagnosis" not in run.out.getvalue()
