"""From prompts to scored groups: what is asked of the rollout engines, and what the reward source makes of it."""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np

from rlhf.engines.base import RewardSource, RolloutEngine, Tokenizer, generate
from rlhf.episode import EpisodeRollout
from rlhf.errors import RewardError
from rlhf.types import GreedyResponse, Prompt, Reward, Rollout, RolloutRequest, Sampling, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPlan:
    """What is sampled for a prompt."""

    group_size: int
    """Responses in a group."""
    sampling: Sampling
    seed: int
    greedy_baseline: bool = False
    """Whether one more response to each prompt is drawn greedily and scored."""
    mixture: float = 0.0
    """Share of the reference in the logits of a group's last `num_opponents` responses."""
    num_opponents: int = 0
    mask_stale_tokens: bool = False
    """Whether tokens that older weights sampled than a response's last token are not learned from."""

    @property
    def draws(self) -> tuple[Sampling, ...]:
        """How each response to a prompt is sampled: those of the group, then the baseline."""
        from_policy = (self.sampling,) * (self.group_size - self.num_opponents)
        opponents = (replace(self.sampling, mixture=self.mixture),) * self.num_opponents
        return (*from_policy, *opponents, *(replace(self.sampling, temperature=0.0),) * self.greedy_baseline)


class Sampler:
    """Asks rollout engines for responses, and the reward source for their scores."""

    def __init__(
        self,
        engine: RolloutEngine,
        rewards: RewardSource,
        tokenizer: Tokenizer,
        awake: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`awake` keeps the engines awake while they generate, where they sleep otherwise."""
        self._engine = engine
        self._rewards = rewards
        self._tokenizer = tokenizer
        self.awake = awake

    def submit(self, requests: Sequence[RolloutRequest]) -> list["Future[Rollout]"]:
        """As the engines' method, which must be awake."""
        return self._engine.submit(requests)

    def abort(self, request_ids: Collection[str]) -> None:
        """As the engines' method."""
        self._engine.abort(request_ids)

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """One rollout a request, in the order of the requests."""
        with self.awake():
            return generate(self._engine, requests)

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> tuple[list[str], list[Reward]]:
        """The responses' texts and rewards, in order. Of a response of several turns, rewards read the last one."""
        firsts = [rollout.first if isinstance(rollout, EpisodeRollout) else 0 for rollout in rollouts]
        shown = [rollout.token_ids[first:] for rollout, first in zip(rollouts, firsts, strict=True)]
        responses = [self._tokenizer.decode(ids) for ids in shown]
        answers = [
            rollout.episode.answer if isinstance(rollout, EpisodeRollout) else response
            for rollout, response in zip(rollouts, responses, strict=True)
        ]
        rewards = self._rewards.score(prompts, answers, rollouts)
        if len(rewards) != len(rollouts):
            ids = ", ".join(prompt.id for prompt in prompts[:4])
            raise RewardError(f"reward: got {len(rewards)} scores for {len(rollouts)} samples (prompt ids {ids}, ...)")
        return responses, rewards


def request_seed(seed: int, *place: str | int) -> int:
    """A sampling seed that depends on the run's seed and on what is sampled alone, in [0, 2^63)."""
    digest = blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def make_requests(step: int, prompts: Sequence[Prompt], plan: RolloutPlan, seen: Counter[str]) -> list[RolloutRequest]:
    """One request for each of the plan's draws, prompt by prompt. `seen` counts how often this step drew a prompt, so
    that a prompt that is drawn again gets other responses."""
    draws = plan.draws
    requests = []
    for prompt in prompts:
        first = seen[prompt.id] * len(draws)
        seen[prompt.id] += 1
        requests += [
            RolloutRequest(
                id=f"{step}/{prompt.id}/{index}",
                prompt_id=prompt.id,
                prompt_token_ids=prompt.token_ids,
                seed=request_seed(plan.seed, step, prompt.id, index),
                sampling=sampling,
            )
            for index, sampling in enumerate(draws, start=first)
        ]
    return requests


def make_group(
    prompt: Prompt, rollouts: Sequence[Rollout], texts: Sequence[str], rewards: Sequence[Reward], plan: RolloutPlan
) -> ScoredGroup:
    """The group of what the plan's draws gave for a prompt."""
    n = plan.group_size
    responses = [without_older_tokens(rollout) for rollout in rollouts[:n]] if plan.mask_stale_tokens else rollouts[:n]
    return ScoredGroup(
        prompt=prompt,
        responses=tuple(responses),
        texts=tuple(texts[:n]),
        rewards=tuple(rewards[:n]),
        baseline=GreedyResponse(rollout=rollouts[n], reward=rewards[n]) if plan.greedy_baseline else None,
    )


def without_older_tokens(rollout: Rollout) -> Rollout:
    """The same response, whose older tokens are not learned from: it is as old as those that are."""
    if not rollout.num_older_tokens:
        return rollout
    newest = np.arange(len(rollout.token_ids)) >= rollout.num_older_tokens
    if rollout.loss_mask is not None:
        newest &= rollout.loss_mask
    return replace(rollout, loss_mask=newest, weight_version=rollout.newest_version)


def scored_part(group: ScoredGroup, plan: RolloutPlan) -> ScoredGroup | None:
    """The responses that have a score. None if too few are left to learn from: one where a group has several, any where
    responses have opponents, or a greedy response without a score."""
    scored = [index for index, reward in enumerate(group.rewards) if reward.is_scored]
    if group.baseline is not None and not group.baseline.reward.is_scored:
        return None
    if len(scored) == len(group.rewards):
        return group
    if len(scored) < min(2, plan.group_size) or plan.num_opponents:
        return None
    return replace(
        group,
        responses=tuple(group.responses[index] for index in scored),
        texts=tuple(group.texts[index] for index in scored),
        rewards=tuple(group.rewards[index] for index in scored),
    )
