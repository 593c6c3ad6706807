"""Settings of the critic-free family: an answer's advantage is its reward against a baseline made of rewards.

Every option of the family is a field of the base class; a member fixes its baseline and brings the combination that
its paper vetted as defaults.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt

from rlhf.config.algo.common import (
    Aggregation,
    Estimator,
    FixedKl,
    KlControl,
    NonNegative,
    PolicyGradientSection,
    Positive,
)

Scale = Literal["none", "group", "batch"]
Ratio = Literal["token", "sequence", "sequence-mean"]


class CriticFreeSection(PolicyGradientSection):
    """What the critic-free methods share."""

    scale: Scale = "none"
    """Deviation that advantages are divided by: of the prompt's answers (group), of all tokens of the batch, whose mean
    then becomes 0 (batch), or none."""
    std: Literal["population", "sample"] = "population"
    """Convention of that deviation: divided by n, or by n - 1."""
    ratio: Ratio = "token"
    """What is clipped: each token's ratio, the whole answer's, or its geometric mean over the tokens."""
    loss: Literal["clip", "cispo"] = "clip"
    """clip is PPO's surrogate; cispo weighs the log-likelihood by the clipped ratio, so that no token is left out."""
    clip_low: float = Field(0.2, gt=0.0, le=1.0)
    """The ratio is clipped at 1 - clip_low; 1 leaves that side open."""
    clip_high: Positive = 0.2
    """The ratio is clipped at 1 + clip_high."""
    dual_clip: NonNegative = 0.0
    """Bound on the loss of a bad token, as a multiple of its advantage, > 1 (Ye et al. 2020); 0 sets none."""
    aggregation: Aggregation = "token-mean"
    """How token losses become one number, always over the whole optimizer step."""
    aggregation_tokens: PositiveInt | None = None
    """Constant length that seq-mean-token-sum-norm divides by; by default rollout.max_response_tokens."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    num_epochs: PositiveInt = 1
    """Passes over each rollout batch."""
    dynamic_sampling: bool = False
    """Leave out prompts whose answers all got the same reward, and sample others in their place."""
    max_sampling_rounds: PositiveInt = 10
    """Most times that a step samples for groups that are not left out."""
    overlong_buffer: Annotated[int, Field(ge=0)] | None = 0
    """Tokens before overlong_limit over which a penalty grows from 0 to -1; 0 does not punish length, null takes a
    fifth of rollout.max_response_tokens."""
    overlong_limit: PositiveInt | None = None
    """Length at which that penalty is whole; by default rollout.max_response_tokens."""

    def with_lengths(self, max_response_tokens: int) -> Self:
        buffer = max_response_tokens // 5 if self.overlong_buffer is None else self.overlong_buffer
        return self.model_copy(
            update={
                "aggregation_tokens": self.aggregation_tokens or max_response_tokens,
                "overlong_limit": self.overlong_limit or max_response_tokens,
                "overlong_buffer": buffer,
            }
        )

    @property
    def sampling_rounds(self) -> int:
        return self.max_sampling_rounds


class GrpoSection(CriticFreeSection):
    """GRPO: reward minus the group's mean, over the group's deviation (Shao et al. 2024)."""

    type: Literal["grpo"] = "grpo"
    """GRPO."""
    scale: Scale = "group"
    """Deviation that advantages are divided by: of the prompt's answers (group), of all tokens of the batch, whose mean
    then becomes 0 (batch), or none."""


class RlooSection(CriticFreeSection):
    """RLOO: reward minus the mean of the prompt's other answers (Ahmadian et al. 2024)."""

    type: Literal["rloo"] = "rloo"
    """REINFORCE leave-one-out."""
    aggregation: Aggregation = "seq-mean-token-sum-norm"
    """How token losses become one number, always over the whole optimizer step; an answer is one action, so they are
    added up."""
    kl: KlControl = FixedKl(coef=0.01)
    """How the KL coefficient moves; a coefficient that stays 0 starts no reference model."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """Where the KL to the reference acts; never in both."""


class ReinforceSection(CriticFreeSection):
    """REINFORCE++: rewards to go, whitened over the batch, KL in the reward (Hu 2025)."""

    type: Literal["reinforce++"] = "reinforce++"
    """REINFORCE++."""
    scale: Scale = "batch"
    """Deviation that advantages are divided by: of the prompt's answers (group), of all tokens of the batch, whose mean
    then becomes 0 (batch), or none."""
    kl: KlControl = FixedKl(coef=0.01)
    """How the KL coefficient moves; a coefficient that stays 0 starts no reference model."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """Where the KL to the reference acts; never in both."""


class ReinforceBaselineSection(CriticFreeSection):
    """REINFORCE++ with baseline: reward minus the group's mean, over the batch's deviation; KL in the loss."""

    type: Literal["reinforce++-baseline"] = "reinforce++-baseline"
    """REINFORCE++ with the group's mean as baseline."""
    scale: Scale = "batch"
    """Deviation that advantages are divided by: of the prompt's answers (group), of all tokens of the batch, whose mean
    then becomes 0 (batch), or none."""
    kl: KlControl = FixedKl(coef=0.01)
    """How the KL coefficient moves; a coefficient that stays 0 starts no reference model."""
    kl_estimator: Estimator = "k2"
    """Estimator of the KL (Schulman 2020); auto is k1 in the reward and k3 in the loss."""


class RemaxSection(CriticFreeSection):
    """ReMax: reward minus that of the greedy answer (Li et al. 2024)."""

    type: Literal["remax"] = "remax"
    """ReMax."""
    kl: KlControl = FixedKl(coef=0.01)
    """How the KL coefficient moves; a coefficient that stays 0 starts no reference model."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """Where the KL to the reference acts; never in both."""


class DrGrpoSection(CriticFreeSection):
    """Dr. GRPO: GRPO without the deviation and without the answer's length (Liu et al. 2025)."""

    type: Literal["dr-grpo"] = "dr-grpo"
    """Dr. GRPO."""
    aggregation: Aggregation = "seq-mean-token-sum-norm"
    """How token losses become one number, always over the whole optimizer step."""


class DapoSection(CriticFreeSection):
    """DAPO: clip-higher, dynamic sampling, token mean, soft punishment of length (Yu et al. 2025)."""

    type: Literal["dapo"] = "dapo"
    """DAPO."""
    scale: Scale = "group"
    """Deviation that advantages are divided by: of the prompt's answers (group), of all tokens of the batch, whose mean
    then becomes 0 (batch), or none."""
    clip_high: Positive = 0.28
    """The ratio is clipped at 1 + clip_high."""
    dynamic_sampling: bool = True
    """Leave out prompts whose answers all got the same reward, and sample others in their place."""
    overlong_buffer: Annotated[int, Field(ge=0)] | None = None
    """Tokens before overlong_limit over which a penalty grows from 0 to -1; 0 does not punish length, null takes a
    fifth of rollout.max_response_tokens."""


class GspoSection(CriticFreeSection):
    """GSPO: the ratio is the geometric mean over the answer's tokens (Zheng et al. 2025)."""

    type: Literal["gspo"] = "gspo"
    """GSPO."""
    scale: Scale = "group"
    """Deviation that advantages are divided by: of the prompt's answers (group), of all tokens of the batch, whose mean
    then becomes 0 (batch), or none."""
    ratio: Ratio = "sequence-mean"
    """What is clipped: each token's ratio, the whole answer's, or its geometric mean over the tokens."""
    clip_low: float = Field(3e-4, gt=0.0, le=1.0)
    """The ratio is clipped at 1 - clip_low; 1 leaves that side open."""
    clip_high: Positive = 4e-4
    """The ratio is clipped at 1 + clip_high."""
    aggregation: Aggregation = "seq-mean-token-mean"
    """How token losses become one number, always over the whole optimizer step."""


class CispoSection(CriticFreeSection):
    """CISPO: the clipped ratio only weighs the log-likelihood (MiniMax 2025)."""

    type: Literal["cispo"] = "cispo"
    """CISPO."""
    scale: Scale = "group"
    """Deviation that advantages are divided by: of the prompt's answers (group), of all tokens of the batch, whose mean
    then becomes 0 (batch), or none."""
    loss: Literal["clip", "cispo"] = "cispo"
    """clip is PPO's surrogate; cispo weighs the log-likelihood by the clipped ratio, so that no token is left out."""
    clip_low: float = Field(1.0, gt=0.0, le=1.0)
    """The ratio is clipped at 1 - clip_low; 1 leaves that side open."""
