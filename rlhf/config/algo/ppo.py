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
    gae_lambda: Fraction = 0.95
    """Decay of GAE's sum of temporal differences; 1 takes the whole return, 0 one step."""
    clip_low: float = Field(0.2, gt=0.0, lt=1.0)
    """The ratio is clipped at 1 - clip_low."""
    clip_high: Positive = 0.2
    """The ratio is clipped at 1 + clip_high."""
    loss: Literal["clip", "penalty"] = "clip"
    """clip is PPO-clip; penalty subtracts an adaptive KL to the old policy instead (Schulman et al. 2017)."""
    penalty_coef: Positive = 1.0
    """Weight of the KL to the old policy at the start, for loss=penalty."""
    penalty_target: Positive = 0.01
    """KL to the old policy, in nats a token, that loss=penalty holds."""
    value_clip: NonNegative = 0.5
    """Largest move of the value from the old one inside the critic's loss; 0 does not clip."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    ptx_coef: NonNegative = 0.0
    """Weight of the likelihood of pretraining text (ptx_path)."""
    ptx_path: str | None = None
    """Rows of text for the ptx loss, read as demonstrations."""
    kl: KlControl = FixedKl()
    """How the KL coefficient moves."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """Where the KL to the reference acts; never in both."""
    num_epochs: PositiveInt = 1
    """Passes over each rollout batch."""
    target_kl: NonNegative = 0.0
    """Stop the passes over a rollout batch once the KL to the old policy, in nats a token, passes this; 0 never."""
    token_level: bool = True
    """Act on tokens (an action is a token); off, an action is a whole answer, and all answers weigh the same."""
    reward_at_end: bool = True
    """Put the whole score on the answer's last token; off, spread it evenly over the answer's tokens."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over the whole rollout batch."""
    normalize_rewards: bool = False
    """Divide rewards by their running deviation after subtracting the running mean."""
    clip_rewards: NonNegative = 10.0
    """Clip rewards, after normalization, to this magnitude; 0 does not clip. The clipped share is logged."""
    critic_warmup_steps: NonNegativeInt = 0
    """First steps in which only the critic learns."""
    aggregation: Aggregation = "token-mean"
    """How token losses become one number, always over the whole optimizer step."""
    aggregation_tokens: PositiveInt = 512
    """Constant length that seq-mean-token-sum-norm divides by; as a rule rollout.max_response_tokens."""

    @property
    def pretraining_path(self) -> str | None:
        return self.ptx_path if self.ptx_coef > 0.0 else None

    @field_validator("kl_estimator")
    @classmethod
    def _loss_needs_a_gradient(cls, estimator: str, info: ValidationInfo) -> str:
        if estimator == "k1" and info.data.get("kl_placement") == "loss":
            raise ValueError("k1 has no gradient in expectation inside the loss; use k2 or k3.")
        return estimator

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
