"""A run whose responses have several turns."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlhf.engines.fakes import FakeRollout
from rlhf.orchestrator.run.samples_shown import sample_lines
from rlhf.orchestrator.step.sampler import without_older_tokens
from rlhf.types import Prompt, Reward, Rollout, RolloutRequest, Sampling
from tests.unit.orchestrator.episodes import WORLD, FailingEpisodes, FakeEpisodes, episodes_run
from tests.unit.orchestrator.support import TOKENIZER, given_group

pytestmark = pytest.mark.timeout(60)


class Reading:
    """Remembers what it was asked to score."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def score(self, prompts: list[Prompt], responses: list[str], rollouts: list[Rollout]) -> list[Reward]:
        self.texts += responses
        return [Reward(total=float(len(rollout.token_ids))) for rollout in rollouts]

    def close(self) -> None: ...


def test_a_run_reports_turns_and_learns_nothing_from_tools(tmp_path: Path) -> None:
    rewards = Reading()
    run = episodes_run(tmp_path / "run", rewards=rewards, num_steps=2)
    run.run()
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    first = rows[0]
    assert (first["agent/turns"], first["agent/calls"], first["agent/calls/add"]) == (2.0, 2.0, 1.0)
    assert (first["agent/failed_calls"], first["agent/world_tokens"], first["throughput/world_seconds"]) == (
        0.5,
        2,
        0.5,
    )
    assert (first["agent/seals"], first["agent/out_of_turns"], first["agent/failed"], first["agent/retries"]) == (
        0,
    ) * 4
    assert first["response/length"] + 2 <= 6
    assert set(rewards.texts) == {"a"}, "rewards read the last turn"
    responses = [json.loads(line) for line in (run.path / "rollouts" / "step_000001.jsonl").read_text().splitlines()]
    assert responses[0]["episode"]["messages"][1] == {"role": "tool", "content": "cc"}


def test_episodes_that_failed_before_their_first_turn_have_no_age(tmp_path: Path) -> None:
    """They are no reason to end the run, whatever version of the weights is live."""
    run = episodes_run(tmp_path / "run", FailingEpisodes(TOKENIZER.num_tokens), num_steps=3)
    run.run()
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all(0 < row["agent/failed"] <= 1 for row in rows)
    assert all(row["rollout/lag_max"] == row["rollout/lag_mean"] == 0 for row in rows)


def test_a_sample_shows_who_said_what() -> None:
    request = RolloutRequest(
        id="r", prompt_id="p", prompt_token_ids=np.array([2, 3]), seed=1, sampling=Sampling(max_tokens=9)
    )
    rollouts = FakeEpisodes(TOKENIZER.num_tokens).generate([request])
    group = replace(given_group(1, ["ab"], [1.0]), responses=tuple(rollouts))
    assert sample_lines(1, group)[1] == "  reward 1: [assistant: a\\ntool: cc]"


def test_older_tokens_and_those_of_tools_are_both_left_out() -> None:
    request = RolloutRequest(
        id="r", prompt_id="p", prompt_token_ids=np.array([2, 3]), seed=1, sampling=Sampling(max_tokens=9)
    )
    (rollout,) = FakeEpisodes(TOKENIZER.num_tokens).generate([request])
    assert rollout.loss_mask is not None
    older = replace(rollout, num_older_tokens=2, newest_version=4)
    masked = without_older_tokens(older)
    assert masked.loss_mask is not None
    assert masked.loss_mask.tolist() == [False] * 3 + [True] * (len(rollout.token_ids) - 3)
    assert rollout.token_ids[1:3].tolist() == [WORLD, WORLD]
    assert masked.weight_version == 4
    (plain,) = FakeRollout(TOKENIZER.num_tokens).generate([request])
    assert without_older_tokens(plain) is plain
