"""A fake engine whose responses have several turns."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from rlhf.engines.fakes import FakeRollout, FakeTrainEngine
from rlhf.episode import Ending, Episode, EpisodeRollout
from rlhf.types import FinishReason, Head, Message, Role, Rollout, RolloutRequest
from tests.unit.orchestrator.support import TOKENIZER, Run, ppo_run

WORLD = 4
"""The token that a tool returns, twice, after the first token of a response."""


class FakeEpisodes(FakeRollout):
    """As FakeRollout; after the first token of each response stand two of a tool."""

    def _respond(self, request: RolloutRequest, table: np.ndarray, version: int) -> Rollout:
        shorter = replace(request, sampling=replace(request.sampling, max_tokens=request.sampling.max_tokens - 2))
        sampled = super()._respond(shorter, table, version)
        ids, log_probs = sampled.token_ids, sampled.log_probs
        whole = replace(
            sampled,
            token_ids=np.concatenate([ids[:1], [WORLD, WORLD], ids[1:]]),
            log_probs=np.concatenate([log_probs[:1], np.zeros(2, dtype=np.float32), log_probs[1:]]),
            loss_mask=np.array([True, False, False, *[True] * (len(ids) - 1)]),
        )
        episode = Episode(
            messages=(Message(role="assistant", content="a"), Message(role="tool", content="cc")),
            ending=Ending.ANSWER,
            num_turns=2,
            calls={"add": 1},
            num_calls=2,
            num_failed_calls=1,
            num_world_tokens=2,
            world_s=0.5,
        )
        return EpisodeRollout.of(whole, episode)


class FailingEpisodes(FakeEpisodes):
    """Those of every prompt but the first fail before their first turn."""

    def _respond(self, request: RolloutRequest, table: np.ndarray, version: int) -> Rollout:
        rollout = super()._respond(request, table, version)
        if request.prompt_id == "p0":
            return rollout
        assert isinstance(rollout, EpisodeRollout)
        nothing = np.zeros(0, dtype=np.int64)
        return replace(
            rollout,
            token_ids=nothing,
            log_probs=nothing.astype(np.float32),
            loss_mask=None,
            finish_reason=FinishReason.ABORTED,
            weight_version=-1,
            episode=replace(rollout.episode, ending=Ending.FAILED, num_turns=0, messages=()),
        )


def episodes_run(path: Path, engine: FakeRollout | None = None, **changes: object) -> Run:
    """PPO on responses of two turns."""
    run = replace(ppo_run(path), **changes)  # type: ignore[arg-type]
    run.rollout = engine or FakeEpisodes(TOKENIZER.num_tokens)
    policy = FakeTrainEngine(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, num_ranks=2, rollout=run.rollout)
    run.engines = {**run.engines, Role.POLICY: policy}
    return run
