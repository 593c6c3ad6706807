"""Settings of PPO."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator

from rlhf.config.algo.common import (
    Aggregation,
    FixedKl,
    Fraction,
    KlControl,
    NonNegative,
    PolicyGradientSection,
    Positive,
)


class PpoSection(PolicyGradientSection):
    """Proximal policy optimization with GAE."""

    type: Literal["ppo"] = "ppo"
    """PPO with GAE."""
    gamma: Fraction = 1.0
    """Discount."""
    turn_discount: Fraction | None = None
    """Rewards for each turn of a response, as tools and environments give them, at the turn's last token; between turns
    they are discounted by this instead of gamma. None: the whole response has one reward, at its end."""
    gae_lambda: Fraction = 0.95
    """GAE's lambda: 1 uses the whole return, 0 one step."""
    clip_low: float = Field(0.2, gt=0.0, lt=1.0)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: Positive = 0.2
    """The ratio is clipped above at 1 + clip_high."""
    loss: Literal["clip", "penalty"] = "clip"
    """clip is PPO-clip; penalty subtracts an adaptive KL to the old policy instead (Schulman et al. 2017)."""
    penalty_coef: Positive = 1.0
    """Weight of the KL to the old policy at the start, for loss=penalty."""
    penalty_target: Positive = 0.01
    """Target of the KL to the old policy, in nats a token, for loss=penalty."""
    truncated: Literal["learn", "mask", "bootstrap"] = "learn"
    """What is done with truncated responses: learn from them as from any other; leave their tokens out of both losses
    (mask); or treat the limit as an interruption instead of an end (bootstrap, Pardo et al. 2018): the critic's value
    at the last token takes the place of the score, and of that token."""
    value_clip: NonNegative = 0.5
    """Value clipping: largest change of a value from the old one in the critic's loss; 0 does not clip."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    ptx_coef: NonNegative = 0.0
    """Weight of the likelihood of pretraining text (ptx_path), the ptx loss of InstructGPT."""
    ptx_path: str | None = None
    """Rows of text for the ptx loss, read as demonstrations."""
    kl: KlControl = FixedKl()
    """KL coefficient: fixed, or adaptive to a target. A fixed coefficient of 0 starts no reference model."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """Where the KL to the reference model acts: subtracted from the reward of each token, or as a term of the loss."""
    num_epochs: PositiveInt = 1
    """PPO epochs: passes over each rollout batch."""
    target_kl: NonNegative = 0.0
    """Target KL (early stopping): stop the epochs over a rollout batch once the KL to the old policy, in nats a token,
    exceeds this; 0 never stops."""
    token_level: bool = True
    """An action is a token; if false, an action is a whole response, and all responses have the same weight."""
    reward_at_end: bool = True
    """Give the whole score to the response's last token; if false, spread it evenly over the response's tokens."""
    whiten_advantages: bool = True
    """Normalize advantages to mean 0 and variance 1 over the whole rollout batch."""
    normalize_rewards: bool = False
    """Subtract the running mean of rewards, and divide by their running standard deviation."""
    clip_rewards: NonNegative = 10.0
    """Clip rewards, after normalization, to this magnitude; 0 does not clip. The clipped share is logged."""
    critic_warmup_steps: NonNegativeInt = 0
    """Critic warm-up: first steps in which only the critic learns."""
    aggregation: Aggregation = "token-mean"
    """How token losses become one number, always over the whole optimizer step: the mean over all tokens; the mean over
    sequences of each one's token mean; or the mean over sequences of each one's token sum divided by a constant
    (aggregation_tokens)."""
    aggregation_tokens: PositiveInt = 512
    """Constant length that seq-mean-token-sum-norm divides by; usually rollout.max_response_tokens."""

    @property
    def pretraining_path(self) -> str | None:
        return self.ptx_path if self.ptx_coef > 0.0 else None

    @field_validator("kl_estimator")
    @classmethod
    def _loss_needs_a_gradient(cls, estimator: str, info: ValidationInfo) -> str:
        if estimator == "k1" and info.data.get("kl_placement") == "loss":
            raise ValueError("k1 has no gradient in expectation inside the loss; use k2 or k3.")
        return estimator

    @field_validator("token_level", "reward_at_end", "normalize_rewards")
    @classmethod
    def _turns_have_their_rewards(cls, value: bool, info: ValidationInfo) -> bool:
        if info.data.get("turn_discount") is not None and value is not cls.model_fields[str(info.field_name)].default:
            raise ValueError(f"{value} does not go with rewards for each turn; leave out algo.turn_discount.")
        return value

    @field_validator("num_epochs")
    @classmethod
    def _penalty_needs_passes(cls, num_epochs: int, info: ValidationInfo) -> int:
        if num_epochs < 2 and info.data.get("loss") == "penalty":
            raise ValueError(f"loss=penalty measures the KL of the second pass on; needs >= 2 (got {num_epochs}).")
        return num_epochs

    @field_validator("target_kl")
    @classmethod
    def _stop_needs_passes(cls, target_kl: float, info: ValidationInfo) -> float:
        if target_kl > 0.0 and info.data.get("num_epochs") == 1:
            raise ValueError("there is only one pass to stop; set algo.num_epochs >= 2 or algo.target_kl 0.")
        return target_kl
