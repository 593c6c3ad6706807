"""Where scored groups come from: read from a data set, or sampled and scored now."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Protocol

from rlhf.engines.base import RewardSource, RolloutEngine, Tokenizer
from rlhf.errors import RewardError, WorkerLostError
from rlhf.orchestrator.step.buffer import LagBuffer
from rlhf.orchestrator.step.rows import Rows
from rlhf.types import FinishReason, GreedyResponse, Prompt, Reward, Rollout, RolloutRequest, Sampling, ScoredGroup

CLOSE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupBatch:
    """The groups of one step. `position` is the data set's position after them, which a checkpoint keeps."""

    groups: tuple[ScoredGroup, ...]
    position: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        """Every response that was sampled for these groups, the greedy baselines included."""
        sampled = [rollout for group in self.groups for rollout in group.rollouts]
        return (*sampled, *(group.baseline.rollout for group in self.groups if group.baseline is not None))


class GroupSource(Protocol):
    """Gives the loop the groups of each step, in order."""

    def start(self, first_step: int, last_step: int, position: int) -> None:
        """Begin with `first_step`, reading rows from `position`. The policy's weights must be live."""
        ...

    def take(self, step: int) -> GroupBatch:
        """Wait for the groups of `step`."""
        ...

    def release(self) -> None:
        """Free the slot of the last taken groups: the weights that were trained on them are live."""
        ...

    def close(self) -> None: ...


class OfflineSource:
    """Groups from a data set of demonstrations or preferences: every row once an epoch. Nothing is waited for."""

    def __init__(self, rows: Rows[ScoredGroup], batch_size: int, keep: Callable[[ScoredGroup], bool]) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._keep = keep

    def start(self, first_step: int, last_step: int, position: int) -> None:
        self._rows.position = position

    def take(self, step: int) -> GroupBatch:
        rows = self._rows.take_batch(self._batch_size)
        groups = tuple(group for group in rows if self._keep(group))
        metrics = {"data/groups_dropped": float(len(rows) - len(groups))}
        return GroupBatch(groups=groups, position=self._rows.position, metrics=metrics)

    def release(self) -> None:
        """A data set has no slots."""

    def close(self) -> None:
        """There is nothing to close."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutPlan:
    """What is sampled for a step."""

    batch_size: int
    """Groups of one step."""
    group_size: int
    """Responses in a group."""
    sampling: Sampling
    seed: int
    max_rounds: int = 10
    """Most times that a step samples again for groups that the algorithm did not keep."""
    greedy_baseline: bool = False
    """Whether one more response to each prompt is drawn greedily and scored."""
    mixture: float = 0.0
    """Share of the reference in the logits of a group's last `num_opponents` responses."""
    num_opponents: int = 0

    @property
    def draws(self) -> tuple[Sampling, ...]:
        """How each response to a prompt is sampled: those of the group, then the baseline."""
        from_policy = (self.sampling,) * (self.group_size - self.num_opponents)
        opponents = (replace(self.sampling, mixture=self.mixture),) * self.num_opponents
        return (*from_policy, *opponents, *(replace(self.sampling, temperature=0.0),) * self.greedy_baseline)


class Sampler:
    """Prompts to scored groups: ask the rollout engine, decode, ask the reward source."""

    def __init__(self, engine: RolloutEngine, rewards: RewardSource, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._rewards = rewards
        self._tokenizer = tokenizer

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        """One rollout a request, in the order of the requests, matched by id."""
        rollouts = {rollout.id: rollout for rollout in self._engine.generate(requests)}
        missing = [request.id for request in requests if request.id not in rollouts]
        if missing or len(rollouts) != len(requests):
            raise WorkerLostError(
                f"rollout: {len(requests)} responses were requested, {len(rollouts)} came "
                f"(missing: {', '.join(missing[:5]) or 'none'})"
            )
        return [rollouts[request.id] for request in requests]

    def score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> tuple[list[str], list[Reward]]:
        """The responses' texts and rewards, in order."""
        responses = [self._tokenizer.decode(rollout.token_ids.tolist()) for rollout in rollouts]
        rewards = self._rewards.score(prompts, responses, rollouts)
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


class RolloutSource:
    """Groups that the policy samples now.

    One producer thread: prompt -> acquire slot -> generate -> score -> buffer.
        consumes: prompts, slots. Produces: batches of groups.
        Waits for: a slot (the trainer's `release`), the engine, the reward source; each with a deadline of its own.
        Unblocked by: `close`, and then only between these waits; the thread is a daemon.
    An error in the thread is raised by `take`.
    """

    def __init__(
        self,
        prompts: Rows[Prompt],
        sampler: Sampler,
        plan: RolloutPlan,
        buffer: LagBuffer[GroupBatch],
        keep: Callable[[ScoredGroup], bool],
    ) -> None:
        self._prompts = prompts
        self._sampler = sampler
        self._plan = plan
        self._buffer = buffer
        self._keep = keep
        self._thread: threading.Thread | None = None

    def start(self, first_step: int, last_step: int, position: int) -> None:
        self._prompts.position = position
        self._thread = threading.Thread(
            target=self._produce, args=(first_step, last_step), name="rollout-producer", daemon=True
        )
        self._thread.start()

    def take(self, step: int) -> GroupBatch:
        return self._buffer.take(step)

    def release(self) -> None:
        self._buffer.release()

    def close(self) -> None:
        self._buffer.close()
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    def _produce(self, first_step: int, last_step: int) -> None:
        try:
            for step in range(first_step, last_step + 1):
                if not self._buffer.acquire(step):
                    return
                self._buffer.put(self._make_batch(step))
        except BaseException as error:
            # The boundary of the thread: the trainer raises it.
            self._buffer.fail(error)

    def _make_batch(self, step: int) -> GroupBatch:
        """Sample until enough groups are kept, or until the rounds are spent."""
        sampled: list[ScoredGroup] = []
        kept: list[ScoredGroup] = []
        seconds: dict[str, float] = defaultdict(float)
        seen: Counter[str] = Counter()
        for _ in range(self._plan.max_rounds):
            prompts = self._prompts.take(self._plan.batch_size - len(kept))
            fresh = self._sample(step, prompts, seen, seconds)
            sampled += fresh
            scored = (scored_part(group, self._plan) for group in fresh)
            kept += [group for group in scored if group is not None and self._keep(group)]
            if len(kept) >= self._plan.batch_size or not prompts:
                break
        if not kept and not any(reward.is_scored for group in sampled for reward in group.rewards):
            raise RewardError(
                f"reward: None for every response of the {len(sampled)} groups sampled for step {step}: there is "
                "nothing to learn from."
            )
        if not kept:
            raise RewardError(
                f"rollout: none of the {len(sampled)} groups sampled for step {step} is worth training on: the "
                "responses to each prompt all got the same reward. Use harder or easier prompts, or another reward"
            )
        return GroupBatch(
            groups=tuple(kept),
            position=self._prompts.position,
            metrics=describe_sampled(sampled, len(kept)),
            seconds=dict(seconds),
        )

    def _sample(
        self, step: int, prompts: Sequence[Prompt], seen: Counter[str], seconds: dict[str, float]
    ) -> list[ScoredGroup]:
        start = time.monotonic()
        n, width = self._plan.group_size, len(self._plan.draws)
        rollouts = self._sampler.generate(make_requests(step, prompts, self._plan, seen))
        generated = time.monotonic()
        responses, rewards = self._sampler.score([prompt for prompt in prompts for _ in range(width)], rollouts)
        seconds["generate"] += generated - start
        seconds["score"] += time.monotonic() - generated
        return [
            ScoredGroup(
                prompt=prompt,
                responses=tuple(rollouts[first : first + n]),
                texts=tuple(responses[first : first + n]),
                rewards=tuple(rewards[first : first + n]),
                baseline=GreedyResponse(rollout=rollouts[first + n], reward=rewards[first + n]) if width > n else None,
            )
            for prompt, first in zip(prompts, range(0, len(rollouts), width), strict=True)
        ]


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


def logged_means(rewards: Sequence[Reward]) -> dict[str, float]:
    """What reward functions reported by `rlhf.log`: the mean of each name over the responses whose call logged it."""
    names = sorted({name for reward in rewards for name in reward.logged})
    found = {name: [reward.logged[name] for reward in rewards if name in reward.logged] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def describe_sampled(groups: Sequence[ScoredGroup], num_kept: int) -> dict[str, float]:
    """Metrics of everything that was sampled, whether it is trained on or not."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = [reward for group in groups for reward in group.rewards]
    if not rollouts:
        return {}
    totals = [reward.total for reward in rewards if reward.is_scored]
    names = sorted({name for reward in rewards for name in reward.parts})
    parts = {name: [reward.parts[name] for reward in rewards if name in reward.parts] for name in names}
    greedy = [group.baseline for group in groups if group.baseline is not None]
    baselines = [one.reward.total for one in greedy if one.reward.is_scored]
    drawn = [*rollouts, *(one.rollout for one in greedy)]
    return {
        **({"reward/mean_all": sum(totals) / len(totals)} if totals else {}),
        "reward/unscored": 1.0 - len(totals) / len(rewards),
        **{f"reward/source/{name}": sum(values) / len(values) for name, values in parts.items()},
        **{f"reward/{name}": mean for name, mean in logged_means(rewards).items()},
        **({"rollout/baseline": sum(baselines) / len(baselines)} if baselines else {}),
        "rollout/tokens": float(sum(len(rollout.token_ids) for rollout in drawn)),
        "rollout/aborted": sum(rollout.finish_reason is FinishReason.ABORTED for rollout in rollouts) / len(rollouts),
        "rollout/groups_dropped": float(len(groups) - num_kept),
    }
