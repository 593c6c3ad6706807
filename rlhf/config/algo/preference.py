"""Settings of learning from pairs: the losses, DPO on given pairs, and online DPO on sampled ones."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from rlhf.config.algo.common import AlgorithmSection, Fraction, NonNegative, Positive
from rlhf.config.base import Section


class PairLossSection(Section):
    """What every pair loss has. In the losses, lp(y) is the sum of a response's log-probs, LR(y) that sum minus the
    reference model's, h = LR(chosen) - LR(rejected), and len(y) the number of the response's tokens."""

    default_lr: ClassVar[float] = 5e-7
    """Learning rate of a policy for which none is given."""
    type: str
    """Kind of the loss."""
    beta: Positive = 0.1
    """Strength of the pull to the reference: a larger beta stays closer to it."""
    humanline: bool = False
    """Clamp each token's log-ratio to the reference before summing (Liu et al. 2025, humanline). A loss that otherwise
    needs no reference starts one for this."""
    humanline_low: float = Field(-1.0, le=0.0, allow_inf_nan=False)
    """Lower bound of that clamp."""
    humanline_high: float = Field(1.5, ge=0.0, allow_inf_nan=False)
    """Upper bound of that clamp."""

    @property
    def uses_reference(self) -> bool:
        """Whether log-probs under the reference are needed."""
        return True

    @property
    def averages_tokens(self) -> bool:
        """Whether a response's log-probs are averaged over its tokens instead of summed."""
        return False


class DpoLoss(PairLossSection):
    """-log sigmoid(beta * h) (Rafailov et al. 2023, arXiv:2305.18290)."""

    type: Literal["dpo"] = "dpo"
    """DPO."""


class CdpoLoss(PairLossSection):
    """-(1 - e) * log sigmoid(beta * h) - e * log sigmoid(-beta * h), for labels that are wrong with a known probability
    e (Mitchell 2023, "A note on DPO with noisy preferences")."""

    type: Literal["cdpo"] = "cdpo"
    """Conservative DPO."""
    label_noise: float = Field(0.1, ge=0.0, lt=0.5)
    """Share of the pairs whose label is wrong."""


class RdpoLoss(PairLossSection):
    """(-(1 - e) * log sigmoid(beta * h) + e * log sigmoid(-beta * h)) / (1 - 2e): in expectation the DPO loss of clean
    labels, where labels are wrong with probability e (Chowdhury et al. 2024, arXiv:2403.00409)."""

    type: Literal["rdpo"] = "rdpo"
    """Robust DPO."""
    label_noise: float = Field(0.1, ge=0.0, lt=0.5)
    """Share of the pairs whose label is wrong."""


class IpoLoss(PairLossSection):
    """(LR(chosen) / len - LR(rejected) / len - 1 / (2 beta))^2 (Azar et al. 2023, arXiv:2310.12036)."""

    type: Literal["ipo"] = "ipo"
    """IPO; beta is the paper's tau."""

    @property
    def averages_tokens(self) -> bool:
        return True


class HingeLoss(PairLossSection):
    """max(0, 1 - beta * h) (Liu et al. 2023, RSO, arXiv:2309.06657)."""

    type: Literal["hinge"] = "hinge"
    """Hinge loss on the implicit rewards."""


class ReferenceFree(PairLossSection):
    """A loss that needs no reference model."""

    beta: Positive = 0.1
    """Scale of the log-probs: with a larger beta, pairs that are already ranked correctly teach less."""

    @property
    def uses_reference(self) -> bool:
        return self.humanline


class SimpoLoss(ReferenceFree):
    """-log sigmoid(beta * lp(chosen) / len - beta * lp(rejected) / len - gamma) (Meng et al. 2024,
    arXiv:2405.14734)."""

    type: Literal["simpo"] = "simpo"
    """SimPO."""
    default_lr: ClassVar[float] = 1e-6
    beta: Positive = 2.0
    """Factor of the length-averaged log-probs."""
    gamma: NonNegative = 0.5
    """Margin by which chosen should win."""

    @property
    def averages_tokens(self) -> bool:
        return True


class WithLikelihood(ReferenceFree):
    """A loss that adds the likelihood of chosen to a preference between whole responses."""

    nll_coef: NonNegative = 1.0
    """Weight of the likelihood of chosen."""
    nll_average: bool = True
    """Average that likelihood over chosen's tokens, as implementations do. false sums it, as in the papers' formulas;
    it then outweighs the preference by the length of a response."""


class SlicLoss(WithLikelihood):
    """max(0, delta - lp(chosen) + lp(rejected)) - nll_coef * lp(chosen) / len (Zhao et al. 2023,
    arXiv:2305.10425)."""

    type: Literal["slic"] = "slic"
    """SLiC-HF."""
    beta: Positive = 1.0
    """Not part of this loss, whose margin is delta; it scales the logged implicit rewards only."""
    delta: Positive = 1.0
    """Margin in nats."""
    nll_coef: NonNegative = 0.1
    """Weight of the likelihood of chosen."""


class OrpoLoss(ReferenceFree):
    """-lp(chosen) / len - beta * log sigmoid(log odds(chosen) - log odds(rejected)), odds = p / (1 - p) of the
    length-averaged probability, log p = lp / len (Hong et al. 2024, arXiv:2403.07691)."""

    type: Literal["orpo"] = "orpo"
    """ORPO; beta is the paper's lambda."""
    default_lr: ClassVar[float] = 8e-6
    beta: Positive = 0.1
    """Weight of the odds ratio, next to the likelihood."""

    @property
    def averages_tokens(self) -> bool:
        return True


class CpoLoss(WithLikelihood):
    """-log sigmoid(beta * (lp(chosen) - lp(rejected))) - nll_coef * lp(chosen) / len (Xu et al. 2024,
    arXiv:2401.08417)."""

    type: Literal["cpo"] = "cpo"
    """CPO."""


class ApoZeroLoss(PairLossSection):
    """1 - sigmoid(beta * LR(chosen)) + sigmoid(beta * LR(rejected)): chosen up, rejected down (D'Oosterlinck et al.
    2024, arXiv:2408.06266)."""

    type: Literal["apo-zero"] = "apo-zero"
    """APO-zero."""


class ApoDownLoss(PairLossSection):
    """sigmoid(beta * LR(chosen)) + 1 - sigmoid(beta * h): both down, rejected further, for chosen responses that are
    worse than the policy's own (D'Oosterlinck et al. 2024, arXiv:2408.06266)."""

    type: Literal["apo-down"] = "apo-down"
    """APO-down."""


class RpoLoss(PairLossSection):
    """-log sigmoid(beta * h) - nll_coef * lp(chosen) / len (Pang et al. 2024, arXiv:2404.19733)."""

    type: Literal["rpo"] = "rpo"
    """RPO, that is DPO + likelihood."""
    nll_coef: NonNegative = 1.0
    """Weight of the likelihood of chosen."""


class LengthPenalizedLoss(PairLossSection):
    """-log sigmoid(beta * h + length_coef * (len(chosen) - len(rejected))): the part of a preference that is explained
    by length is not learned (Park et al. 2024, arXiv:2403.19159)."""

    type: Literal["r-dpo"] = "r-dpo"
    """R-DPO, length-regularized."""
    length_coef: NonNegative = 0.01
    """Nats of the preference that one more token of the chosen response explains."""


class LengthNormalizedLoss(PairLossSection):
    """-log sigmoid(beta * (LR(chosen) / len - LR(rejected) / len)) (Lambert et al. 2024, Tulu 3, arXiv:2411.15124)."""

    type: Literal["ln-dpo"] = "ln-dpo"
    """LN-DPO, length-normalized."""
    beta: Positive = 5.0
    """Strength of the pull to the reference, per token."""

    @property
    def averages_tokens(self) -> bool:
        return True


class DiscopopLoss(PairLossSection):
    """(1 - m) * -log sigmoid(z) + m * exp(-z), z = beta * h, m = sigmoid(z / tau): a loss found by a language model (Lu
    et al. 2024, arXiv:2406.08414). It is not monotone: with tau 0.05 it rises from z = -0.12 to 0.07, so a pair near
    the start (z = 0) gets a gradient in the wrong direction until other pairs move it out of this range."""

    type: Literal["discopop"] = "discopop"
    """DiscoPOP."""
    tau: float = Field(0.05, gt=0.0, le=1.0)
    """Temperature of the modulation; above 1 the loss of a wrong pair would grow exponentially."""


PairLoss = Annotated[
    DpoLoss
    | CdpoLoss
    | RdpoLoss
    | IpoLoss
    | HingeLoss
    | SimpoLoss
    | SlicLoss
    | OrpoLoss
    | CpoLoss
    | ApoZeroLoss
    | ApoDownLoss
    | RpoLoss
    | LengthPenalizedLoss
    | LengthNormalizedLoss
    | DiscopopLoss,
    Field(discriminator="type"),
]
OnlinePairLoss = Annotated[DpoLoss | IpoLoss | HingeLoss, Field(discriminator="type")]


class DpoSection(AlgorithmSection):
    """Direct preference optimization on given pairs (Rafailov et al. 2023, arXiv:2305.18290) and its variants, by
    algo.loss: a mean over the pairs of a step.

    In the losses, lp(y) is the sum of the policy's log-probs over a response, LR(y) = lp(y) minus the reference model's
    sum, h = LR(chosen) - LR(rejected), and len the number of the response's tokens.
    """

    type: Literal["dpo"] = "dpo"
    """Learning from given pairs."""
    loss: PairLoss = DpoLoss()
    """Loss on a pair."""

    @property
    def uses_reference(self) -> bool:
        return self.loss.uses_reference


class OnlineDpoSection(AlgorithmSection):
    """Online DPO: best against worst of each prompt's own responses (Guo et al. 2024, arXiv:2402.04792), with the
    losses of [dpo](#dpo): -log sigmoid(beta * h), h = LR(best) - LR(worst), LR(y) = log(policy / reference) of a
    response."""

    type: Literal["online-dpo"] = "online-dpo"
    """Learning from pairs of the policy's own responses."""
    loss: OnlinePairLoss = DpoLoss()
    """Loss on a pair."""
    reference: Literal["frozen", "refresh", "ema", "behavior"] = "frozen"
    """Reference model: the policy before training (frozen); a copy of the policy that is refreshed every
    reference_every_steps (refresh); an exponential moving average of the policy (ema); or the weights that sampled the
    responses (behavior; BPO, Xu et al. 2024, arXiv:2406.12168), which needs no model and is constant only within a
    step."""
    reference_every_steps: PositiveInt = 50
    """Steps between refreshes."""
    reference_decay: Fraction = 0.99
    """Decay of the moving average in one step."""
    mixture: Fraction = 0.0
    """Share of the reference in the policy that samples, a geometric mixture (with the ipo loss: IPO-MD, Calandriello
    et al. 2024, arXiv:2403.08635)."""

    @property
    def uses_reference(self) -> bool:
        return self.reference == "frozen"


class NashMdSection(AlgorithmSection):
    """Nash-MD: each response y of the policy is compared with a response y' of a geometric mixture of policy and
    reference (Munos et al. 2023, arXiv:2312.00886). The gradient is that of (P(y beats y') - 1/2) * log policy(y) -
    beta * KL(policy, reference)."""

    type: Literal["nash-md"] = "nash-md"
    """Nash-MD."""
    beta: Positive = 0.1
    """Weight of the KL to the reference, the paper's tau."""
    mixture: Fraction = 0.25
    """Share of the reference in the geometric mixture that the opponent is sampled from."""
    preference: Literal["bradley-terry", "win-rate"] = "bradley-terry"
    """How two rewards become P(y beats y'). bradley-terry: the sigmoid of their difference, for a reward model or a
    rule. win-rate: for a pairwise judge, whose rewards are the shares of comparisons that each response won."""

    @property
    def uses_reference(self) -> bool:
        return True


OnlinePreference = Annotated[OnlineDpoSection | NashMdSection, Field(discriminator="type")]
