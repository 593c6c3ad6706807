"""Settings of learning from pairs: the losses, DPO on given pairs, and online DPO on sampled ones."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from rlhf.config.algo.common import AlgorithmSection, Fraction, NonNegative, Positive
from rlhf.config.base import Section


class PairLossSection(Section):
    """What every loss on a pair has."""

    type: str
    """Kind of the loss."""
    beta: Positive = 0.1
    """Weight of the distance from the reference: larger stays nearer."""
    humanline: bool = False
    """Clamp each token's log-ratio to the reference before it is summed (Liu et al. 2025, humanline)."""
    humanline_low: float = Field(-1.0, le=0.0, allow_inf_nan=False)
    """Lower end of that clamp."""
    humanline_high: float = Field(1.5, ge=0.0, allow_inf_nan=False)
    """Upper end of that clamp."""

    @property
    def uses_reference(self) -> bool:
        """Whether log-probs under the reference are needed."""
        return True


class DpoLoss(PairLossSection):
    """-log sigmoid(beta * h) (Rafailov et al. 2023)."""

    type: Literal["dpo"] = "dpo"
    """DPO."""


class CdpoLoss(PairLossSection):
    """DPO for labels that are wrong with a known probability (Mitchell 2023)."""

    type: Literal["cdpo"] = "cdpo"
    """Conservative DPO."""
    label_noise: float = Field(0.1, ge=0.0, lt=0.5)
    """Share of the pairs that are labelled the wrong way round."""


class RdpoLoss(PairLossSection):
    """DPO, unbiased under labels that are wrong with a known probability (Chowdhury et al. 2024)."""

    type: Literal["rdpo"] = "rdpo"
    """Robust DPO."""
    label_noise: float = Field(0.1, ge=0.0, lt=0.5)
    """Share of the pairs that are labelled the wrong way round."""


class IpoLoss(PairLossSection):
    """(h - 1 / (2 beta))^2 with length-averaged log-probs (Azar et al. 2023)."""

    type: Literal["ipo"] = "ipo"
    """IPO; beta is the paper's tau."""


class HingeLoss(PairLossSection):
    """max(0, 1 - beta * h) (Liu et al. 2023, RSO)."""

    type: Literal["hinge"] = "hinge"
    """Hinge loss on the implicit rewards."""


class ReferenceFree(PairLossSection):
    """A loss that starts no reference."""

    @property
    def uses_reference(self) -> bool:
        return False


class SimpoLoss(ReferenceFree):
    """-log sigmoid(beta * (mean log-prob of chosen - of rejected) - gamma) (Meng et al. 2024)."""

    type: Literal["simpo"] = "simpo"
    """SimPO."""
    beta: Positive = 2.0
    """Factor of the length-averaged log-probs."""
    gamma: NonNegative = 0.5
    """Margin that chosen is to win by."""


class SlicLoss(ReferenceFree):
    """max(0, delta - lp(chosen) + lp(rejected)) + likelihood of chosen (Zhao et al. 2023)."""

    type: Literal["slic"] = "slic"
    """SLiC-HF."""
    delta: Positive = 1.0
    """Margin in nats."""
    nll_coef: NonNegative = 0.1
    """Weight of the likelihood of chosen."""


class OrpoLoss(ReferenceFree):
    """Likelihood of chosen and the log odds ratio (Hong et al. 2024)."""

    type: Literal["orpo"] = "orpo"
    """ORPO; beta is the paper's lambda."""


class CpoLoss(ReferenceFree):
    """-log sigmoid(beta * (lp(chosen) - lp(rejected))) + likelihood of chosen (Xu et al. 2024)."""

    type: Literal["cpo"] = "cpo"
    """CPO."""
    nll_coef: NonNegative = 1.0
    """Weight of the likelihood of chosen."""


class ApoZeroLoss(PairLossSection):
    """Chosen up, rejected down (D'Oosterlinck et al. 2024)."""

    type: Literal["apo-zero"] = "apo-zero"
    """APO-zero."""


class ApoDownLoss(PairLossSection):
    """Both down, rejected more: for chosen answers that are worse than the policy's own (D'Oosterlinck et al. 2024)."""

    type: Literal["apo-down"] = "apo-down"
    """APO-down."""


class RpoLoss(PairLossSection):
    """DPO and the length-averaged likelihood of chosen (Pang et al. 2024)."""

    type: Literal["rpo"] = "rpo"
    """RPO, that is DPO + likelihood."""
    nll_coef: NonNegative = 1.0
    """Weight of the likelihood of chosen."""


class LengthPenalizedLoss(PairLossSection):
    """DPO with a margin that punishes the longer answer (Park et al. 2024, R-DPO)."""

    type: Literal["r-dpo"] = "r-dpo"
    """R-DPO, length-regularised."""
    length_coef: NonNegative = 0.01
    """Nats that chosen must win by for each token that it is longer."""


class LengthNormalizedLoss(PairLossSection):
    """DPO on length-averaged log-ratios (Lambert et al. 2024, Tulu 3)."""

    type: Literal["ln-dpo"] = "ln-dpo"
    """LN-DPO, length-normalised."""
    beta: Positive = 5.0
    """Weight of the distance from the reference, per token."""


class DiscopopLoss(PairLossSection):
    """The log-ratio modulated loss that a language model found (Lu et al. 2024)."""

    type: Literal["discopop"] = "discopop"
    """DiscoPOP."""
    tau: Positive = 0.05
    """Temperature of the modulation."""


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
    """Direct preference optimisation on given pairs (Rafailov et al. 2023) and its variants."""

    type: Literal["dpo"] = "dpo"
    """Learning from given pairs."""
    loss: PairLoss = DpoLoss()
    """What a pair is worth."""

    @property
    def uses_reference(self) -> bool:
        return self.loss.uses_reference


class OnlineDpoSection(AlgorithmSection):
    """Online DPO: best against worst of each prompt's own answers (Guo et al. 2024)."""

    type: Literal["online-dpo"] = "online-dpo"
    """Learning from pairs of the policy's own answers."""
    loss: OnlinePairLoss = DpoLoss()
    """What a pair is worth."""
    reference: Literal["frozen", "refresh", "ema", "behaviour"] = "frozen"
    """What the policy is held to: the model it started as; itself of some steps ago, copied every reference_every_steps
    (refresh); a running mean of itself (ema); or the weights that sampled the answers (behaviour, BPO)."""
    reference_every_steps: PositiveInt = 50
    """Steps between refreshes."""
    reference_decay: Fraction = 0.99
    """Share of the running mean that one step keeps."""
    mixture: Fraction = 0.0
    """Share of the reference in the policy that samples, a geometric mixture (IPO-MD, Calandriello et al. 2024)."""

    @property
    def uses_reference(self) -> bool:
        return self.reference == "frozen"


class NashMdSection(AlgorithmSection):
    """Nash-MD: the policy against a mixture of itself and the reference, judged pairwise (Munos et al. 2023)."""

    type: Literal["nash-md"] = "nash-md"
    """Nash-MD."""
    beta: Positive = 0.1
    """Weight of the KL to the reference."""
    mixture: Fraction = 0.25
    """Share of the reference in the geometric mixture that the opponent is sampled from."""

    @property
    def uses_reference(self) -> bool:
        return True


OnlinePreference = Annotated[OnlineDpoSection | NashMdSection, Field(discriminator="type")]
