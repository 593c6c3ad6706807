"""From scores to per-token rewards: running normalization, clipping, and the KL penalty."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf.algorithms.advantages import Floats
from rlhf.algorithms.kl import Estimator, kl_estimate
from rlhf.algorithms.responses import ResponseTokens, mean
from rlhf.algorithms.state import number
from rlhf.config.algo import PpoSection
from rlhf.types import Json, Metrics


@dataclass
class RunningStatistics:
    """Mean and population deviation of all numbers seen so far (Welford 1962). Equal numbers deviate by exactly 0."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared distances from the mean."""

    def add(self, numbers: Floats) -> None:
        for x in numbers.tolist():
            self.count += 1.0
            distance = x - self.mean
            self.mean += distance / self.count
            self.squares += distance * (x - self.mean)

    @property
    def deviation(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def normalize(self, numbers: Floats) -> Floats:
        """(x - mean) / deviation, and x - mean where nothing deviates yet."""
        return (numbers - self.mean) / (self.deviation or 1.0)

    def state(self) -> dict[str, Json]:
        return {"reward_count": self.count, "reward_mean": self.mean, "reward_squares": self.squares}

    def restore(self, state: Mapping[str, Json]) -> None:
        self.count = number(state, "reward_count")
        self.mean = number(state, "reward_mean")
        self.squares = number(state, "reward_squares")


def clip(rewards: Floats, limit: float) -> Floats:
    """Clip to [-limit, limit]; 0 does not clip."""
    return np.clip(rewards, -limit, limit) if limit else rewards


def at_end(score: float, num_tokens: int) -> Floats:
    """The score on the last of a response's own tokens, which need not be an EOS: a truncated response has none,
    and none is added. For a response without tokens the result is empty."""
    rewards = np.zeros(num_tokens)
    rewards[-1:] = score
    return rewards


def spread(score: float, num_tokens: int) -> Floats:
    """The score in equal parts on all of a response's own tokens."""
    return np.full(num_tokens, score / max(num_tokens, 1))


def at_turns(score: float, response: ResponseTokens) -> Floats:
    """What each turn earned at its last token, and what else the score is made of at the response's last; nothing of
    what turns earned before the first token."""
    of_turns = response.earned_before + sum(earned for _, earned in response.turns)
    rewards = at_end(score - of_turns, len(response))
    for end, earned in response.turns:
        rewards[end] += earned
    return rewards


def kl_penalty(response: ResponseTokens, estimator: Estimator, coef: float) -> Floats:
    """-coef times the estimated KL to the reference, at each of a response's own tokens."""
    if response.ref_log_probs is None:
        return np.zeros(len(response))
    old, ref = torch.from_numpy(response.old_log_probs), torch.from_numpy(response.ref_log_probs)
    penalty: Floats = -coef * kl_estimate(estimator, old, ref).numpy()
    return penalty


class RewardShaper:
    """r_t = -beta * KL_t + [t is the last token] * score, the score normalized and clipped before (Ouyang et al. 2022).

    What it remembers is the running statistics of the scores.
    """

    def __init__(self, section: PpoSection) -> None:
        self._section = section
        self._statistics = RunningStatistics()

    def shape(self, responses: Sequence[ResponseTokens], kl_coef: float) -> tuple[list[Floats], Metrics]:
        """The rewards of each response's own tokens. Responses without tokens stay out of the statistics, and so do
        truncated ones whose score is not used."""
        section = self._section
        coef = kl_coef if section.kl_placement == "reward" else 0.0
        scores = np.array([one.score - section.truncated_penalty * one.truncated for one in responses])
        scored = np.array([self._uses_score(one) for one in responses], dtype=np.bool_)
        if section.normalize_rewards:
            self._statistics.add(scores[scored])
            scores = self._statistics.normalize(scores)
        clipped = np.where(scored, clip(scores, section.clip_rewards), 0.0)
        rewards = [
            self._placed(score, response) + kl_penalty(response, section.estimator, coef)
            for score, response in zip(clipped.tolist(), responses, strict=True)
        ]
        sums = {
            "reward/shaped": mean([float(reward.sum()) for reward in rewards if len(reward)]),
            "reward/clipped": mean((clipped != scores)[scored]),
        }
        if section.normalize_rewards:
            sums |= {"reward/running_mean": self._statistics.mean, "reward/running_std": self._statistics.deviation}
        return rewards, Metrics(sums=sums)

    def _placed(self, score: float, response: ResponseTokens) -> Floats:
        if self._section.turn_discount is not None:
            return at_turns(score, response)
        return (at_end if self._section.reward_at_end else spread)(score, len(response))

    def _uses_score(self, response: ResponseTokens) -> bool:
        """Not where a value takes the place of the score, or nothing is learned."""
        return len(response) > 0 and (not response.truncated or self._section.truncated == "learn")

    def state(self) -> dict[str, Json]:
        return self._statistics.state()

    def restore(self, state: Mapping[str, Json]) -> None:
        self._statistics.restore(state)
