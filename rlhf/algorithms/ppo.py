"""Proximal policy optimization with generalized advantage estimation, as used for language models.

Schulman et al. 2017 (arXiv:1707.06347) for the losses, Ouyang et al. 2022 (arXiv:2203.02155) for the KL-shaped reward.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from rlhf.algorithms.advantages import Floats, explained_variance, gae_of_all, whiten, whole_response
from rlhf.algorithms.base import Algorithm, LossOutput, Objective, Outputs, TensorBatch
from rlhf.algorithms.importance import importance_weights, with_sampler
from rlhf.algorithms.kl import PenaltyController, kl_controller
from rlhf.algorithms.losses import negative_log_likelihood, to_metrics
from rlhf.algorithms.needs import ppo_needs
from rlhf.algorithms.ppo_objectives import ValueObjective, policy_objective
from rlhf.algorithms.responses import ResponseTokens, mean, num_learned, ref_kl_metrics, responses_of, with_credit
from rlhf.algorithms.rewards import RewardShaper
from rlhf.algorithms.state import number
from rlhf.config.algo import PpoSection
from rlhf.types import (
    Example,
    Experience,
    Json,
    Metrics,
    Role,
    Signals,
)


class PPO(Algorithm):
    """Policy and critic learn from sampled responses and their rewards.

    r_t = -beta * (lp_t - lp_ref_t) + [t is the last token] * score; delta_t = r_t + gamma * V_{t+1} - V_t;
    A_t = sum_l (gamma * lambda)^l * delta_{t+l}. The policy's loss is -min(rho_t * A_t, clip(rho_t) * A_t), that of
    the critic max((V - R)^2, (clip(V) - R)^2) / 2 with the return R_t = A_t + V_t.

    Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155; GAE: Schulman et al. 2016,
    arXiv:1506.02438.
    """

    def __init__(self, section: PpoSection) -> None:
        self._section = section
        self._kl = kl_controller(section.kl)
        self._penalty = PenaltyController(coef=section.penalty_coef, target=section.penalty_target)
        self._shaper = RewardShaper(section)
        self._num_credited = 0
        self.needs = ppo_needs(section)

    def credit(self, examples: Sequence[Example], signals: Sequence[Signals]) -> tuple[list[Experience], Metrics]:
        """Shape the scores into token rewards, then estimate advantages and returns."""
        coefficients = {"kl": self._kl.coef, "penalty": self._penalty.start_update()}
        signals = with_sampler(self._section.correction, examples, signals)
        responses = responses_of(examples, signals)
        learned = [num_learned(response, self._section.truncated) for response in responses]
        advantages, returns, metrics = self._credited(responses, learned)
        experiences = [
            Experience(
                id=example.id,
                sequences=(with_credit(example, signal, a, num_tokens=num_tokens, returns=r),),
                coefficients=coefficients,
            )
            for example, signal, a, r, num_tokens in zip(examples, signals, advantages, returns, learned, strict=True)
        ]
        return experiences, metrics

    def describe(self, examples: Sequence[Example], signals: Sequence[Signals]) -> Metrics:
        """The KL to the reference, by which the KL coefficient moves, and the importance weights."""
        responses = responses_of(examples, with_sampler(self._section.correction, examples, signals))
        non_empty = [response.kl for response in responses if len(response)]
        # During critic warm-up the policy is still the reference: its KL of 0 says nothing about the coefficient.
        if self._num_credited > self._section.critic_warmup_steps:
            self._kl.update(mean(non_empty), len(non_empty))
        return ref_kl_metrics(responses) + importance_weights(self._section.correction, responses)[1]

    def _credited(
        self, responses: Sequence[ResponseTokens], learned: Sequence[int]
    ) -> tuple[list[Floats], list[Floats], Metrics]:
        """Advantages and returns of each response's first `learned` tokens; of a whole response that is one action: one
        of each."""
        advantages, returns, reward_metrics = self._estimates(responses, learned)
        metrics = reward_metrics + self._metrics(advantages, returns)
        self._num_credited += 1
        if self._section.whiten_advantages:
            advantages = whiten(advantages)
        return advantages, returns, metrics

    def _estimates(
        self, responses: Sequence[ResponseTokens], learned: Sequence[int]
    ) -> tuple[list[Floats], list[Floats], Metrics]:
        """Advantages and returns of each response's first `learned` actions, and metrics of the rewards. The value of a
        token that is bootstrapped ends the recursion before it."""
        rewards, metrics = self._shaper.shape(responses, self._kl.coef)
        values = [response.values for response in responses]
        if self._section.token_level:
            cut = [self._section.truncated == "bootstrap" and one.truncated and len(one) > 0 for one in responses]
            gammas = [self._discounts(response) for response in responses]
            estimates = gae_of_all(
                [one[:-1] if is_cut else one for one, is_cut in zip(rewards, cut, strict=True)],
                [one[:-1] if is_cut else one for one, is_cut in zip(values, cut, strict=True)],
                [float(one[-1]) if is_cut else 0.0 for one, is_cut in zip(values, cut, strict=True)],
                gamma=[one[:-1] if is_cut else one for one, is_cut in zip(gammas, cut, strict=True)],
                gae_lambda=self._section.gae_lambda,
            )
        else:
            estimates = [whole_response(*one) for one in zip(rewards, values, strict=True)]
        advantages = [a[:num_tokens] for (a, _), num_tokens in zip(estimates, learned, strict=True)]
        returns = [r[:num_tokens] for (_, r), num_tokens in zip(estimates, learned, strict=True)]
        return advantages, returns, metrics

    def _discounts(self, response: ResponseTokens) -> Floats:
        """[n]: the discount of what follows each token."""
        gammas = np.full(len(response), self._section.gamma)
        if self._section.turn_discount is not None:
            gammas[[end for end, _ in response.turns]] = self._section.turn_discount
        return gammas

    def objectives(self) -> Mapping[str, Objective]:
        policy = policy_objective(self._section)
        return {Role.POLICY: policy, Role.CRITIC: ValueObjective(self._section), "ptx": self._ptx_loss}

    def _ptx_loss(self, outputs: Outputs, batch: TensorBatch) -> LossOutput:
        loss = negative_log_likelihood(outputs.predictions, batch)
        return LossOutput(loss=self._section.ptx_coef * loss, metrics=to_metrics({"ptx/loss": loss}))

    def _metrics(self, advantages: Sequence[Floats], returns: Sequence[Floats]) -> Metrics:
        """Metrics of advantages and returns, before whitening."""
        joined, total = np.concatenate([*advantages, np.zeros(0)]), np.concatenate([*returns, np.zeros(0)])
        sums = {
            "kl/coef": self._kl.coef,
            "advantages/mean": mean(joined),
            "advantages/std": float(joined.std()) if len(joined) else 0.0,
            "returns/mean": mean(total),
            "critic/explained_variance": explained_variance(joined, total),
        }
        if self._section.loss == "penalty":
            sums["policy/penalty_coef"] = self._penalty.coef
        return Metrics(sums=sums)

    def after_pass(self, metrics: Metrics) -> bool:
        """Stop early once the policy has moved too far from the one that sampled."""
        kl = metrics.sums.get("policy/approx_kl")
        if kl is None:
            return True
        self._penalty.observe(kl)
        return not 0.0 < self._section.target_kl < kl

    def state(self) -> dict[str, Json]:
        parts = {**self._kl.state(), **self._penalty.state(), **self._shaper.state()}
        return {**parts, "num_credited": self._num_credited}

    def restore(self, state: Mapping[str, Json]) -> None:
        self._num_credited = int(number({"num_credited": self._section.critic_warmup_steps, **state}, "num_credited"))
        for part in (self._kl, self._penalty, self._shaper):
            part.restore(state)
