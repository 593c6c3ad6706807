"""What the critic-free methods share: a response's advantage is its reward minus a baseline made of rewards."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from rlhf.algorithms.advantages import Floats, are_equal, deviation, whiten
from rlhf.algorithms.base import Algorithm, Objective
from rlhf.algorithms.importance import importance_weights, with_sampler
from rlhf.algorithms.kl import kl_controller
from rlhf.algorithms.losses import token_weights
from rlhf.algorithms.needs import critic_free_needs
from rlhf.algorithms.policy_loss import RATIOS, Cispo, Clip, PolicyObjective, Surrogate
from rlhf.algorithms.ppo_objectives import kl_in_loss
from rlhf.algorithms.responses import ResponseTokens, mean, num_learned, ref_kl_metrics, responses_of, with_credit
from rlhf.algorithms.rewards import at_end, kl_penalty
from rlhf.algorithms.sequences import is_empty
from rlhf.algorithms.zero_advantage import ZeroAdvantageWatch
from rlhf.config.algo import CriticFreeSection
from rlhf.types import (
    Example,
    Experience,
    FinishReason,
    GreedyResponse,
    Json,
    Metrics,
    Role,
    ScoredGroup,
    Signals,
)

EPSILON = 1e-6
"""Beside a group's deviation: rewards that differ by less than this, as float32 does by chance, stay nearly equal."""


class CriticFree(Algorithm):
    """Each method computes its `advantages`; everything else follows from its settings."""

    def __init__(self, section: CriticFreeSection) -> None:
        self._section = section
        self._kl = kl_controller(section.kl)
        self._zero_advantage = ZeroAdvantageWatch()
        self.needs = critic_free_needs(section)

    @abstractmethod
    def advantages(self, rewards: Sequence[Floats], greedy: float | None) -> list[Floats]:
        """Advantages of the responses to one prompt, one number per token: `rewards[i]` are those of response i's
        tokens, at least one; `greedy` is the score of the greedy response, penalties included, where `greedy_baseline`
        asks for it. The arrays returned are new: scaling changes them in place."""

    def keep(self, group: ScoredGroup) -> bool:
        """With dynamic sampling: whether the rewards of the group differ. Responses without tokens do not count."""
        scores = [
            reward.total
            for response, reward in zip(group.responses, group.rewards, strict=True)
            if not is_empty(group.prompt, response)
        ]
        return not (self._section.dynamic_sampling and are_equal(np.array(scores)))

    def credit(self, examples: Sequence[Example], signals: Sequence[Signals]) -> tuple[list[Experience], Metrics]:
        """Rewards, then advantages within each prompt's responses, then over the batch. Responses without tokens are
        left out of baselines."""
        signals = with_sampler(self._section.correction, examples, signals)
        coefficients = {"kl": self._kl.coef}
        credited, metrics = self._credited(examples, responses_of(examples, signals))
        experiences = [
            Experience(
                id=example.id,
                sequences=(with_credit(example, signal, advantages, num_tokens=len(advantages)),),
                coefficients=coefficients,
            )
            for example, signal, advantages in zip(examples, signals, credited, strict=True)
        ]
        return experiences, metrics

    def describe(self, examples: Sequence[Example], signals: Sequence[Signals]) -> Metrics:
        """The KL to the reference, by which the KL coefficient moves, and the importance weights."""
        responses = responses_of(examples, with_sampler(self._section.correction, examples, signals))
        non_empty = [response.kl for response in responses if len(response)]
        self._kl.update(mean(non_empty), len(non_empty))
        return ref_kl_metrics(responses) + importance_weights(self._section.correction, responses)[1]

    def _credited(
        self, examples: Sequence[Example], responses: Sequence[ResponseTokens]
    ) -> tuple[list[Floats], Metrics]:
        """Advantages of the tokens that are learned from."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, response in enumerate(responses):
            if len(response):
                groups[examples[i].group].append(i)
        totals = [0.0] * len(responses)
        advantages = [np.zeros(0) for _ in responses]
        for members in groups.values():
            greedy = examples[members[0]].baseline
            rewards = [self._rewards(responses[i]) for i in members]
            for i, reward in zip(members, rewards, strict=True):
                totals[i] = float(reward.sum())
            of_group = self._advantages(
                rewards, [totals[i] for i in members], None if greedy is None else self._greedy_score(greedy)
            )
            for i, one in zip(members, of_group, strict=True):
                advantages[i] = one[: num_learned(responses[i], self._section.truncated)]
        advantages = self._scaled_over_batch(advantages, [totals[i] for i in chain(*groups.values())])
        in_groups = [[responses[i] for i in members] for members in groups.values()]
        totals = [total for total, response in zip(totals, responses, strict=True) if len(response)]
        return advantages, self._metrics(in_groups, totals, advantages)

    def _scaled_over_batch(self, advantages: list[Floats], totals: Sequence[float]) -> list[Floats]:
        """Advantages of the whole batch, divided by a standard deviation that all of it shares, where `scale` says so;
        `totals` are the rewards of all responses with tokens."""
        is_sample = self._section.std == "sample"
        if self._section.scale == "batch":
            return whiten(advantages, sample=is_sample)
        if self._section.scale == "batch-rewards":
            scale = deviation(np.array(totals), sample=is_sample) + EPSILON
            return [advantage / scale for advantage in advantages]
        return advantages

    def _rewards(self, response: ResponseTokens) -> Floats:
        """Of each token: the score and the length penalty on the last, the KL on all where it acts here."""
        coef = self._kl.coef if self._section.kl_placement == "reward" else 0.0
        score = self._score(response.score, len(response), response.truncated)
        rewards = self._placed(score, response)
        return rewards + kl_penalty(response, self._section.estimator, coef) if coef else rewards

    def _placed(self, score: float, response: ResponseTokens) -> Floats:
        """The score on the tokens that earned it: on the last one, unless a method gives credit to turns."""
        return at_end(score, len(response))

    def _greedy_score(self, greedy: GreedyResponse) -> float:
        rollout = greedy.rollout
        num_tokens = len(rollout.token_ids) if rollout.loss_mask is None else int(rollout.loss_mask.sum())
        return self._score(greedy.reward.total, num_tokens, rollout.finish_reason is FinishReason.LENGTH)

    def _score(self, score: float, num_tokens: int, truncated: bool) -> float:
        """The score with the penalties on length."""
        return score + self._overlong(num_tokens) - self._section.truncated_penalty * truncated

    def _overlong(self, num_tokens: int) -> float:
        """Soft penalty on length (Yu et al. 2025, eq. 13): 0 up to limit - buffer tokens, then falling to -1."""
        limit, buffer = self._section.overlong_limit, self._section.overlong_buffer
        if not buffer or limit is None:
            return 0.0
        return -min(max(num_tokens - (limit - buffer), 0) / buffer, 1.0)

    def _advantages(self, rewards: Sequence[Floats], totals: Sequence[float], greedy: float | None) -> list[Floats]:
        """Of the responses to one prompt, whose tokens' rewards add up to `totals`."""
        advantages = self.advantages(rewards, greedy)
        if self._section.scale != "group":
            return advantages
        scale = deviation(np.array(totals), sample=self._section.std == "sample") + EPSILON
        for one in advantages:
            np.divide(one, scale, out=one)
        return advantages

    def objectives(self) -> Mapping[str, Objective]:
        section = self._section
        if section.aggregation == "seq-mean-token-sum-norm" and section.aggregation_tokens is None:
            raise ValueError("seq-mean-token-sum-norm needs algo.aggregation_tokens")
        clip = Clip(section.clip_low, section.clip_high, section.dual_clip)
        surrogate: Surrogate = Cispo(section.clip_low, section.clip_high) if section.loss == "cispo" else clip
        policy = PolicyObjective(
            surrogate,
            weights=token_weights(section.aggregation, section.aggregation_tokens or 1.0),
            ratio=RATIOS[section.ratio],
            entropy_coef=section.entropy_coef,
            kl=kl_in_loss(section),
            limits=section.log_ratio_limits,
            correction=section.correction,
        )
        return {Role.POLICY: policy}

    def _metrics(
        self, groups: Sequence[Sequence[ResponseTokens]], totals: Sequence[float], advantages: Sequence[Floats]
    ) -> Metrics:
        """Metrics of rewards, whose sums over responses are `totals`, and of advantages before importance weights."""
        joined = np.concatenate([*advantages, np.zeros(0)])
        several = [np.array([response.score for response in group]) for group in groups if len(group) > 1]
        sums = {
            "kl/coef": self._kl.coef,
            "advantages/mean": mean(joined),
            "advantages/std": deviation(joined, sample=False),
            "reward/shaped": mean(totals),
            "groups/zero_std": mean([are_equal(scores) for scores in several]),
        }
        self._zero_advantage.observe(joined)
        if self._section.overlong_buffer:
            sums["reward/overlong"] = mean([self._overlong(len(response)) for group in groups for response in group])
        return Metrics(sums=sums, warnings=self._zero_advantage.warnings())

    def state(self) -> dict[str, Json]:
        return {**self._kl.state(), **self._zero_advantage.state()}

    def restore(self, state: Mapping[str, Json]) -> None:
        self._kl.restore(state)
        self._zero_advantage.restore(state)
