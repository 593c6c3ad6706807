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
    """What the rest of a run asks of any algorithm's settings."""

    type: str = ""
    """Kind of the algorithm."""

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
        """Rows of text whose likelihood is learned beside the task."""
        return None

    def with_lengths(self, _max_response_tokens: int) -> Self:
        """The same settings with every default filled in that depends on the longest response."""
        return self

    @property
    def sampling_rounds(self) -> int:
        """Most times that a step samples for groups that are kept."""
        return 10


class FixedKl(Section):
    """A KL coefficient that stays."""

    type: Literal["fixed"] = "fixed"
    """The coefficient stays."""
    coef: NonNegative = 0.01
    """Weight of the KL penalty; 0 trains without a reference model."""


class AdaptiveKl(Section):
    """A KL coefficient that moves in proportion to the distance from a target (Ziegler et al. 2019)."""

    type: Literal["adaptive"] = "adaptive"
    """The coefficient follows a target."""
    coef: Positive = 0.01
    """Weight of the KL penalty at the start."""
    target: Positive = 6.0
    """KL a response, in nats, to hold."""
    horizon: PositiveInt = 10_000
    """Responses over which the coefficient may change by a fifth."""


KlControl = Annotated[FixedKl | AdaptiveKl, Field(discriminator="type")]


class NoCorrection(Section):
    """Sampler and trainer are taken for the same policy."""

    type: Literal["none"] = "none"
    """No correction."""


class TruncatedWeights(Section):
    """Weights min(p_trainer / p_sampler, cap) on what was sampled (Yao et al. 2025)."""

    type: Literal["truncate"] = "truncate"
    """Weigh by the truncated importance ratio."""
    level: Literal["token", "sequence"] = "token"
    """Ratio of each token, or of the whole answer."""
    cap: Positive = 2.0
    """Largest weight."""


class MaskedWeights(Section):
    """Nothing is learned from what the trainer finds much more or less likely than the sampler did; the rest is
    weighed by its ratio."""

    type: Literal["mask"] = "mask"
    """Weigh by the importance ratio inside a band, and leave out what lies outside."""
    level: Literal["token", "sequence"] = "token"
    """Ratio of each token, or of the whole answer."""
    low: Positive = 0.5
    """Smallest ratio that is learned from."""
    high: Positive = 2.0
    """Largest ratio that is learned from."""


class RatioToSampler(Section):
    """The sampler stands for the old policy: what is clipped is p_policy / p_sampler, which needs no weight beside it,
    and no pass of the trainer over the answers before it learns from them. Nothing then compares the two beforehand."""

    type: Literal["ratio"] = "ratio"
    """Take the clipped ratio against the sampler; the trainer makes no pass over the answers before it learns."""


Correction = Annotated[NoCorrection | TruncatedWeights | MaskedWeights | RatioToSampler, Field(discriminator="type")]


class PolicyGradientSection(AlgorithmSection):
    """What PPO and the critic-free methods share: the KL to the reference, and importance correction."""

    kl: KlControl = FixedKl(coef=0.0)
    """How the KL coefficient moves; a coefficient that stays 0 starts no reference model."""
    kl_placement: Literal["reward", "loss"] = "loss"
    """Where the KL to the reference acts; never in both."""
    kl_estimator: Estimator = "auto"
    """Estimator of the KL (Schulman 2020); auto is k1 in the reward and k3 in the loss."""
    correction: Correction = TruncatedWeights()
    """How the policy's loss accounts for responses that were sampled by older weights (off-policy), or by an engine
    whose arithmetic differs from the trainer's."""

    @property
    def estimator(self) -> Literal["k1", "k2", "k3"]:
        """The KL estimator, auto resolved."""
        if self.kl_estimator != "auto":
            return self.kl_estimator
        return "k1" if self.kl_placement == "reward" else "k3"

    @property
    def uses_reference(self) -> bool:
        return not (isinstance(self.kl, FixedKl) and self.kl.coef == 0.0)
