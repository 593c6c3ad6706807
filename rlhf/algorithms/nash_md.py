"""Nash-MD, the policy-gradient form: toward an equilibrium of a preference (Munos et al. 2023, arXiv:2312.00886,
section 7)."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from rlhf.algorithms.base import Algorithm, LossOutput, Objective, Outputs, TensorBatch
from rlhf.algorithms.kl import clamped_exp
from rlhf.algorithms.losses import entropy_of, masked, present, to_metrics, token_mean
from rlhf.algorithms.needs import nash_md_needs
from rlhf.algorithms.responses import ResponseTokens, mean, ref_kl_metrics, with_credit
from rlhf.algorithms.sequences import is_empty, join, sampler_log_probs, version_of
from rlhf.config.algo import NashMdSection
from rlhf.types import Example, Experience, FinishReason, Metrics, Role, ScoredGroup, Signal, Signals


class NashMD(Algorithm):
    """The first response of each group is the policy's; the last, its opponent, is drawn from the mixture of policy and
    reference and is not learned from. Both were scored, or judged against each other."""

    def __init__(self, section: NashMdSection) -> None:
        self._section = section
        self._dropped = 0
        self.needs = nash_md_needs(section)

    def select(self, groups: Sequence[ScoredGroup]) -> list[Example]:
        """One response per prompt, with its reward and its opponent's. A group where one of the two holds no token is
        dropped and counted."""
        examples = [duel(group) for group in groups]
        kept = [example for example in examples if example is not None]
        self._dropped += len(examples) - len(kept)
        return kept

    def credit(self, examples: Sequence[Example], signals: Sequence[Signals]) -> tuple[list[Experience], Metrics]:
        """P(y beats y') - 1/2 - beta * (the KL from this token on, since earlier tokens do not depend on it). The
        expected gradient is that of the whole response's KL, with less variance."""
        responses = [ResponseTokens.of(example, signal) for example, signal in zip(examples, signals, strict=True)]
        preferences = [self._preference(*example.rewards) for example in examples]
        experiences = []
        for example, signal, response, preference in zip(examples, signals, responses, preferences, strict=True):
            assert response.ref_log_probs is not None
            kl_to_go = np.cumsum((response.old_log_probs - response.ref_log_probs)[::-1])[::-1]
            advantages = preference - 0.5 - self._section.beta * kl_to_go
            experiences.append(Experience(id=example.id, sequences=(with_credit(example, signal, advantages),)))
        dropped, self._dropped = self._dropped, 0
        sums = {"nash/preference": mean(preferences), "pairs/empty": float(dropped)}
        return experiences, ref_kl_metrics(responses) + Metrics(sums=sums)

    def _preference(self, reward: float, opponents: float) -> float:
        """P(y beats y'). Of two that only met each other, the shares of wins are P and 1 - P."""
        if self._section.preference == "win-rate":
            return min(1.0, max(0.0, (1.0 + reward - opponents) / 2.0))
        return (1.0 + math.tanh((reward - opponents) / 2.0)) / 2.0

    def objectives(self) -> Mapping[str, Objective]:
        return {Role.POLICY: self._policy_loss}

    def _policy_loss(self, outputs: Outputs, batch: TensorBatch) -> LossOutput:
        """-sum(ratio * advantage) per prompt; REINFORCE's gradient at the first update, where the ratio is 1."""
        mask = batch.loss_mask
        old = masked(present(batch, Signal.OLD_LOG_PROBS), mask)
        advantages = masked(present(batch, Signal.ADVANTAGES), mask)
        ratio = clamped_exp(masked(outputs.predictions, mask) - old)
        loss = -(ratio * advantages).sum() / max(batch.denominators.examples, 1.0)
        entropy = entropy_of(outputs, batch) * token_mean(batch)
        return LossOutput(loss=loss, metrics=to_metrics({"policy/loss": loss, "policy/entropy": entropy.sum()}))


def duel(group: ScoredGroup) -> Example | None:
    """The group's first response, with its reward and the last response's."""
    sides = (group.responses[0], group.responses[-1])
    if any(is_empty(group.prompt, response) for response in sides):
        return None
    response = sides[0]
    return Example(
        id=response.id,
        sequences=(join(group.prompt, response),),
        rewards=(group.rewards[0].total, group.rewards[-1].total),
        sampler_log_probs=sampler_log_probs(group.prompt, response),
        truncated=(response.finish_reason is FinishReason.LENGTH,),
        weight_version=version_of(response),
        group=response.id,
    )
