"""Settings of the critic-free family: a response's advantage is its reward minus a baseline made of rewards.

The base class has every option of the family. A member fixes its baseline, and its defaults are the combination that
its paper tested.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt

from rlhf.config.algo.common import (
    Aggregation,
    Correction,
    Estimator,
    FixedKl,
    Fraction,
    KlControl,
    NonNegative,
    PolicyGradientSection,
    Positive,
    TruncatedWeights,
)

Scale = Literal["none", "group", "batch", "batch-rewards"]
Ratio = Literal["token", "sequence", "sequence-mean"]


class CriticFreeSection(PolicyGradientSection):
    """What the critic-free methods share."""

    scale: Scale = "none"
    """Standard deviation that advantages are divided by: that of the prompt's responses (group), that of all tokens of
    the batch, whose mean then becomes 0 (batch), that of the rewards of all responses of the batch (batch-rewards), or
    none."""
    std: Literal["population", "sample"] = "population"
    """Convention of that standard deviation: divided by n (population) or by n - 1 (sample)."""
    ratio: Ratio = "token"
    """Importance ratio that is clipped: each token's, the whole response's (sequence), or the geometric mean over the
    response's tokens (sequence-mean)."""
    loss: Literal["clip", "cispo"] = "clip"
    """clip is PPO's clipped surrogate; cispo weights the log-likelihood by the clipped ratio, so that every token keeps
    a gradient."""
    clip_low: float = Field(0.2, gt=0.0, le=1.0)
    """The ratio is clipped below at 1 - clip_low; 1 does not clip there."""
    clip_high: Positive = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    truncated: Literal["learn", "mask"] = "learn"
    """What is done with truncated responses: learn from them as from any other, or leave their tokens out of the loss
    (mask; the overlong filtering of DAPO). Their scores stay in the baseline of their group."""
    aggregation: Aggregation = "token-mean"
    """How token losses become one number, always over the whole optimizer step: the mean over all tokens; the mean over
    sequences of each one's token mean; or the mean over sequences of each one's token sum divided by a constant
    (aggregation_tokens)."""
    aggregation_tokens: PositiveInt | None = None
    """Constant length that seq-mean-token-sum-norm divides by; by default rollout.max_response_tokens."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    num_epochs: PositiveInt = 1
    """Epochs over each rollout batch (the mu of GRPO)."""
    dynamic_sampling: bool = False
    """Dynamic sampling (filter groups): leave out prompts whose responses all got the same reward (zero standard
    deviation, hence no advantage), and sample others in their place."""
    max_sampling_rounds: PositiveInt = 10
    """Most rounds of sampling in one step, with dynamic_sampling."""
    overlong_buffer: Annotated[int, Field(ge=0)] | None = 0
    """Soft overlong punishment: a penalty that grows from 0 to -1 over this many tokens before overlong_limit. 0: no
    length penalty; null: a fifth of rollout.max_response_tokens."""
    overlong_limit: PositiveInt | None = None
    """Length at which that penalty is -1; by default rollout.max_response_tokens."""

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
    """GRPO: reward minus the group's mean, divided by the group's standard deviation (Shao et al. 2024)."""

    type: Literal["grpo"] = "grpo"
    """GRPO."""
    scale: Scale = "group"
    """Standard deviation that advantages are divided by: that of the prompt's responses (group), that of all tokens of
    the batch, whose mean then becomes 0 (batch), that of the rewards of all responses of the batch (batch-rewards), or
    none."""


class RlooSection(CriticFreeSection):
    """RLOO: reward minus the mean of the prompt's other responses (Ahmadian et al. 2024)."""

    type: Literal["rloo"] = "rloo"
    """REINFORCE leave-one-out."""
    aggregation: Aggregation = "seq-mean-token-sum-norm"
    """How token losses become one number, always over the whole optimizer step. A response is one action, so its token
    losses are summed."""
    kl: KlControl = FixedKl(coef=0.01)
    """KL coefficient: fixed, or adaptive to a target. A fixed coefficient of 0 starts no reference model."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """Where the KL to the reference model acts: subtracted from the reward of each token, or as a term of the loss."""


class ReinforceSection(CriticFreeSection):
    """REINFORCE++: rewards to go, whitened over the batch, KL in the reward (Hu 2025)."""

    type: Literal["reinforce++"] = "reinforce++"
    """REINFORCE++."""
    scale: Scale = "batch"
    """Standard deviation that advantages are divided by: that of the prompt's responses (group), that of all tokens of
    the batch, whose mean then becomes 0 (batch), that of the rewards of all responses of the batch (batch-rewards), or
    none."""
    kl: KlControl = FixedKl(coef=0.01)
    """KL coefficient: fixed, or adaptive to a target. A fixed coefficient of 0 starts no reference model."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """Where the KL to the reference model acts: subtracted from the reward of each token, or as a term of the loss."""
    turn_discount: Fraction | None = None
    """Rewards for each turn of a response, as tools and environments give them, at the turn's last token; what later
    turns earn is discounted by this between turns. None: the whole response has one reward, at its end."""


class ReinforceBaselineSection(CriticFreeSection):
    """REINFORCE++ with baseline: reward minus the group's mean, divided by the batch's standard deviation; KL in the
    loss."""

    type: Literal["reinforce++-baseline"] = "reinforce++-baseline"
    """REINFORCE++ with the group's mean as baseline."""
    scale: Scale = "batch"
    """Standard deviation that advantages are divided by: that of the prompt's responses (group), that of all tokens of
    the batch, whose mean then becomes 0 (batch), that of the rewards of all responses of the batch (batch-rewards), or
    none."""
    kl: KlControl = FixedKl(coef=0.01)
    """KL coefficient: fixed, or adaptive to a target. A fixed coefficient of 0 starts no reference model."""
    kl_estimator: Estimator = "k2"
    """Estimator of the KL (Schulman 2020); auto is k1 in the reward and k3 in the loss."""


class RemaxSection(CriticFreeSection):
    """ReMax: reward minus that of the greedy response (Li et al. 2024)."""

    type: Literal["remax"] = "remax"
    """ReMax."""
    kl: KlControl = FixedKl(coef=0.01)
    """KL coefficient: fixed, or adaptive to a target. A fixed coefficient of 0 starts no reference model."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """Where the KL to the reference model acts: subtracted from the reward of each token, or as a term of the loss."""


class DrGrpoSection(CriticFreeSection):
    """Dr. GRPO: GRPO without dividing by the standard deviation or by the response's length (Liu et al. 2025)."""

    type: Literal["dr-grpo"] = "dr-grpo"
    """Dr. GRPO."""
    aggregation: Aggregation = "seq-mean-token-sum-norm"
    """How token losses become one number, always over the whole optimizer step: the mean over all tokens; the mean over
    sequences of each one's token mean; or the mean over sequences of each one's token sum divided by a constant
    (aggregation_tokens)."""


class DapoSection(CriticFreeSection):
    """DAPO: clip-higher, dynamic sampling, token-level loss, soft overlong punishment (Yu et al. 2025)."""

    type: Literal["dapo"] = "dapo"
    """DAPO."""
    scale: Scale = "group"
    """Standard deviation that advantages are divided by: that of the prompt's responses (group), that of all tokens of
    the batch, whose mean then becomes 0 (batch), that of the rewards of all responses of the batch (batch-rewards), or
    none."""
    clip_high: Positive = 0.28
    """The ratio is clipped above at 1 + clip_high."""
    dynamic_sampling: bool = True
    """Dynamic sampling (filter groups): leave out prompts whose responses all got the same reward (zero standard
    deviation, hence no advantage), and sample others in their place."""
    overlong_buffer: Annotated[int, Field(ge=0)] | None = None
    """Soft overlong punishment: a penalty that grows from 0 to -1 over this many tokens before overlong_limit. 0: no
    length penalty; null: a fifth of rollout.max_response_tokens."""


class GspoSection(CriticFreeSection):
    """GSPO: the ratio is the geometric mean over the response's tokens (Zheng et al. 2025)."""

    type: Literal["gspo"] = "gspo"
    """GSPO."""
    correction: Correction = TruncatedWeights(level="sequence")
    """Importance correction: how the loss accounts for responses that were sampled off-policy (by older weights), or by
    an engine whose arithmetic differs from the trainer's. Like the ratio, the weight is that of a whole response."""
    scale: Scale = "group"
    """Standard deviation that advantages are divided by: that of the prompt's responses (group), that of all tokens of
    the batch, whose mean then becomes 0 (batch), that of the rewards of all responses of the batch (batch-rewards), or
    none."""
    ratio: Ratio = "sequence-mean"
    """Importance ratio that is clipped: each token's, the whole response's (sequence), or the geometric mean over the
    response's tokens (sequence-mean)."""
    clip_low: float = Field(3e-4, gt=0.0, le=1.0)
    """The ratio is clipped below at 1 - clip_low; 1 does not clip there."""
    clip_high: Positive = 4e-4
    """The ratio is clipped at 1 + clip_high."""
    aggregation: Aggregation = "seq-mean-token-mean"
    """How token losses become one number, always over the whole optimizer step."""


class CispoSection(CriticFreeSection):
    """CISPO: the clipped ratio only weighs the log-likelihood (MiniMax 2025)."""

    type: Literal["cispo"] = "cispo"
    """CISPO."""
    scale: Scale = "group"
    """Standard deviation that advantages are divided by: that of the prompt's responses (group), that of all tokens of
    the batch, whose mean then becomes 0 (batch), that of the rewards of all responses of the batch (batch-rewards), or
    none."""
    loss: Literal["clip", "cispo"] = "cispo"
    """clip is PPO's clipped surrogate; cispo weights the log-likelihood by the clipped ratio, so that every token keeps
    a gradient."""
    clip_low: float = Field(1.0, gt=0.0, le=1.0)
    """The ratio is clipped below at 1 - clip_low; 1 does not clip there."""
