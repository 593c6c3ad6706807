"""What the algorithms' settings share: the base class, bounds, the KL coefficient, and importance correction."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt

from rlhf.config.base import Section

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
Estimator = Literal["auto", "k1", "k2", "k3"]


class AlgorithmSection(Section):
    """Settings of an algorithm, and what the rest of a run asks of any algorithm's settings."""

    type: str = ""
    """Kind of the algorithm."""
    router_aux_coef: NonNegative = 0.0
    """Weight of the load-balancing loss of a mixture of experts (router_aux_loss_coef in transformers), over all tokens
    that an optimizer step learns from; 0 has none. An optimizer step of several micro-batches then takes one more
    forward pass, which counts the experts' tokens."""

    @property
    def uses_reference(self) -> bool:
        """Whether a frozen reference model is started."""
        return False

    @property
    def is_one_update(self) -> bool:
        """Whether all responses of a step must be learned from in one optimizer step."""
        return False

    @property
    def pretraining_path(self) -> str | None:
        """Rows of text whose likelihood is learned in addition to the task (the ptx loss)."""
        return None

    def with_lengths(self, _max_response_tokens: int) -> Self:
        """The same settings with every default filled in that depends on the longest response."""
        return self

    @property
    def sampling_rounds(self) -> int:
        """Most rounds of sampling in one step, until enough groups are kept."""
        return 10

    @property
    def masks_stale_tokens(self) -> bool:
        """Whether a response that went on over a weight sync is learned from with its newest tokens alone."""
        return False


class FixedKl(Section):
    """A constant KL coefficient."""

    type: Literal["fixed"] = "fixed"
    """A constant coefficient."""
    coef: NonNegative = 0.01
    """Weight of the KL penalty; 0 trains without a reference model."""


class AdaptiveKl(Section):
    """A KL coefficient that changes in proportion to the distance from a target (Ziegler et al. 2019)."""

    type: Literal["adaptive"] = "adaptive"
    """The coefficient follows a target."""
    coef: Positive = 0.01
    """Weight of the KL penalty at the start."""
    target: Positive = 6.0
    """Target of the KL of a response, in nats."""
    horizon: PositiveInt = 10_000
    """Responses over which the coefficient may change by a fifth."""


KlControl = Annotated[FixedKl | AdaptiveKl, Field(discriminator="type")]


class NoCorrection(Section):
    """The rollout engine and the trainer are treated as the same policy."""

    type: Literal["none"] = "none"
    """No correction."""


class TruncatedWeights(Section):
    """Truncated importance sampling (TIS): weights min(p_trainer / p_sampler, cap) on what was sampled (Yao et al.
    2025)."""

    type: Literal["truncate"] = "truncate"
    """TIS: weight by the truncated importance ratio."""
    level: Literal["token", "sequence"] = "token"
    """Ratio of each token, or of the whole response."""
    cap: Positive = 2.0
    """Largest weight."""


class MaskedWeights(Section):
    """Masked importance sampling (IcePop): tokens or responses whose ratio p_trainer / p_sampler is outside a band are
    left out of the loss; the others are weighted by the ratio."""

    type: Literal["mask"] = "mask"
    """Weight by the importance ratio inside a band, and leave out what is outside (IcePop)."""
    level: Literal["token", "sequence"] = "token"
    """Ratio of each token, or of the whole response."""
    low: Positive = 0.5
    """Smallest ratio that is learned from."""
    high: Positive = 2.0
    """Largest ratio that is learned from."""


class RatioToSampler(Section):
    """The sampler's log-probs are the old log-probs: the clipped ratio is p_policy / p_sampler. It needs no importance
    weight, and no pass of the trainer over the responses before training. Nothing then compares sampler and trainer
    before they are learned from."""

    type: Literal["ratio"] = "ratio"
    """Use the sampler's log-probs as the old log-probs; the trainer computes none."""


Correction = Annotated[NoCorrection | TruncatedWeights | MaskedWeights | RatioToSampler, Field(discriminator="type")]


class PolicyGradientSection(AlgorithmSection):
    """What PPO and the critic-free methods share: the KL to the reference, and importance correction."""

    kl: KlControl = FixedKl(coef=0.0)
    """KL coefficient: fixed, or adaptive to a target. A fixed coefficient of 0 starts no reference model."""
    kl_placement: Literal["reward", "loss"] = "loss"
    """Where the KL to the reference model acts: subtracted from the reward of each token, or as a term of the loss."""
    kl_estimator: Estimator = "auto"
    """Estimator of the KL (Schulman 2020); auto is k1 in the reward and k3 in the loss."""
    correction: Correction = TruncatedWeights()
    """Importance correction: how the loss accounts for responses that were sampled off-policy (by older weights), or by
    an engine whose arithmetic differs from the trainer's."""
    dual_clip: NonNegative = 0.0
    """Dual clip: bound on the loss of a token with negative advantage, as a multiple of its advantage, > 1 (Ye et al.
    2020); 0 sets none."""
    mask_stale_tokens: bool = False
    """Learn from the newest tokens alone of a response that went on over a weight sync (rollout.max_lag above 0): those
    that older weights sampled get no loss. The response's advantage stays that of the whole."""
    truncated_penalty: NonNegative = 0.0
    """Subtracted from the score of a truncated response, one that reached rollout.max_response_tokens."""
    humanline: bool = False
    """Clamp each token's log-ratio to the old policy before it becomes a ratio (Liu et al. 2025, humanline). A token
    outside the clamp has no gradient in either direction, unlike one outside the clip."""
    humanline_low: float = Field(-1.0, le=0.0, allow_inf_nan=False)
    """Lower bound of that clamp."""
    humanline_high: float = Field(1.5, ge=0.0, allow_inf_nan=False)
    """Upper bound of that clamp."""

    @property
    def masks_stale_tokens(self) -> bool:
        return self.mask_stale_tokens

    @property
    def log_ratio_limits(self) -> tuple[float, float] | None:
        """The humanline clamp; None without it."""
        return (self.humanline_low, self.humanline_high) if self.humanline else None

    @property
    def estimator(self) -> Literal["k1", "k2", "k3"]:
        """The KL estimator, auto resolved."""
        if self.kl_estimator != "auto":
            return self.kl_estimator
        return "k1" if self.kl_placement == "reward" else "k3"

    @property
    def uses_reference(self) -> bool:
        return not (isinstance(self.kl, FixedKl) and self.kl.coef == 0.0)
