"""Settings of the algorithms."""

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf.config.base import Section


class FixedKl(Section):
    """A KL coefficient that stays."""

    type: Literal["fixed"] = "fixed"
    """The coefficient stays."""
    coef: NonNegativeFloat = Field(0.01, allow_inf_nan=False)
    """Weight of the KL penalty."""


class AdaptiveKl(Section):
    """A KL coefficient that moves in proportion to the distance from a target (Ziegler et al. 2019)."""

    type: Literal["adaptive"] = "adaptive"
    """The coefficient follows a target."""
    coef: NonNegativeFloat = Field(0.01, allow_inf_nan=False)
    """Weight of the KL penalty at the start."""
    target: PositiveFloat = 6.0
    """KL a response, in nats, to hold."""
    horizon: PositiveInt = 10_000
    """Responses over which the coefficient adapts."""


KlControl = Annotated[FixedKl | AdaptiveKl, Field(discriminator="type")]


class SftSection(Section):
    """Supervised fine-tuning: negative log-likelihood of the response tokens."""

    type: Literal["sft"] = "sft"
    """Supervised fine-tuning."""


class RmSection(Section):
    """Reward model: Bradley-Terry over the pairs of a ranking."""

    type: Literal["rm"] = "rm"
    """Reward model."""
    use_margins: bool = True
    """Subtract the data's margins inside the loss, where rows have them."""


class PpoSection(Section):
    """Proximal policy optimisation with GAE."""

    type: Literal["ppo"] = "ppo"
    """PPO with GAE."""
    gamma: FiniteFloat = Field(1.0, ge=0.0, le=1.0)
    """Discount."""
    gae_lambda: FiniteFloat = Field(0.95, ge=0.0, le=1.0)
    """Decay of GAE's sum of temporal differences."""
    clip_low: PositiveFloat = Field(0.2, lt=1.0)
    """The ratio is clipped at 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The ratio is clipped at 1 + clip_high."""
    loss: Literal["clip", "penalty"] = "clip"
    """clip is PPO-clip; penalty subtracts an adaptive KL to the old policy instead (Schulman et al. 2017)."""
    penalty_coef: NonNegativeFloat = 1.0
    """Weight of the KL to the old policy at the start, for loss=penalty."""
    penalty_target: PositiveFloat = 0.01
    """KL to the old policy, in nats a token, that loss=penalty holds."""
    value_clip: NonNegativeFloat = 0.5
    """Largest move of the value from the old one inside the critic's loss; 0 does not clip."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    ptx_coef: NonNegativeFloat = 0.0
    """Weight of the likelihood of pretraining text (ptx_path)."""
    ptx_path: str | None = None
    """Rows of text for the ptx loss, read as demonstrations."""
    kl: KlControl = FixedKl()
    """How the KL coefficient moves."""
    kl_placement: Literal["reward", "loss"] = "reward"
    """Where the KL to the reference acts; never in both."""
    kl_estimator: Literal["auto", "k1", "k2", "k3"] = "auto"
    """Estimator of the KL; auto is k1 in the reward and k3 in the loss."""
    num_epochs: PositiveInt = 1
    """Passes over each rollout batch."""
    kl_stop: NonNegativeFloat = 0.0
    """Stop the passes over a rollout batch once the KL to the old policy, in nats a token, passes this; 0 never."""
    token_level: bool = True
    """Act on tokens (an action is a token); off, an action is a whole answer."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over the whole rollout batch."""
    normalize_rewards: bool = False
    """Divide rewards by their running deviation after subtracting the running mean."""
    clip_rewards: NonNegativeFloat = 10.0
    """Clip (normalised) rewards to this magnitude; 0 does not clip."""
    freeze_policy_steps: NonNegativeInt = 0
    """First steps in which only the critic learns."""
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = "token-mean"
    """How token losses become one number, always over the whole optimizer step."""
