"""Losses on pairs of responses as pure functions, one for each `type` of `rlhf.config.algo.PairLoss`.

Each takes P pairs and its settings, and returns a loss [P]. With lp the policy's log-prob of a response, LR its
log-ratio to the reference and h = LR(chosen) - LR(rejected), the formulas stand in the settings' docstrings.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from rlhf.config.algo.preference import (
    ApoDownLoss,
    ApoZeroLoss,
    CdpoLoss,
    CpoLoss,
    DiscopopLoss,
    DpoLoss,
    HingeLoss,
    IpoLoss,
    LengthNormalizedLoss,
    LengthPenalizedLoss,
    OrpoLoss,
    RdpoLoss,
    RpoLoss,
    SimpoLoss,
    SlicLoss,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One side of P pairs: [P] numbers of whole responses, in nats.

    `log_probs` and `log_ratios` (to the reference; the log-probs themselves where there is none) are sums over an
    response's tokens, or means over them for a loss that `averages_tokens`. `lengths` count its tokens.
    """

    log_probs: torch.Tensor
    log_ratios: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """P pairs of responses to the same prompts."""

    chosen: Side
    rejected: Side

    @property
    def h(self) -> torch.Tensor:
        """[P]: how much more than the reference the policy prefers chosen."""
        return self.chosen.log_ratios - self.rejected.log_ratios


def dpo(pairs: Pairs, loss: DpoLoss | LengthNormalizedLoss) -> torch.Tensor:
    """Also LN-DPO, whose log-ratios are averages."""
    return -logsigmoid(loss.beta * pairs.h)


def cdpo(pairs: Pairs, loss: CdpoLoss) -> torch.Tensor:
    """Cross-entropy with the softened label."""
    z = loss.beta * pairs.h
    return -(1 - loss.label_noise) * logsigmoid(z) - loss.label_noise * logsigmoid(-z)


def rdpo(pairs: Pairs, loss: RdpoLoss) -> torch.Tensor:
    """The noise taken out again: its mean over flipped labels is DPO's loss of the clean ones."""
    z = loss.beta * pairs.h
    noise = loss.label_noise
    return (noise * logsigmoid(-z) - (1 - noise) * logsigmoid(z)) / (1 - 2 * noise)


def ipo(pairs: Pairs, loss: IpoLoss) -> torch.Tensor:
    """A square: the preference is to be as large as beta says, and no larger."""
    return (pairs.h - 1 / (2 * loss.beta)).square()


def hinge(pairs: Pairs, loss: HingeLoss) -> torch.Tensor:
    """Nothing more is learned from a pair whose implicit rewards are 1 apart."""
    return (1 - loss.beta * pairs.h).relu()


def simpo(pairs: Pairs, loss: SimpoLoss) -> torch.Tensor:
    """On averages; without humanline the log-ratios are the log-probs."""
    return -logsigmoid(loss.beta * (pairs.chosen.log_probs - pairs.rejected.log_probs) - loss.gamma)


def slic(pairs: Pairs, loss: SlicLoss) -> torch.Tensor:
    """A margin in sums of log-probs, and likelihood in place of the paper's distance from the SFT model."""
    margin = (loss.delta - pairs.chosen.log_probs + pairs.rejected.log_probs).relu()
    return margin - loss.nll_coef * likelihood(pairs.chosen, average=loss.nll_average)


def orpo(pairs: Pairs, loss: OrpoLoss) -> torch.Tensor:
    """Likelihood, and odds of the average token."""
    ratio = log_odds(pairs.chosen.log_probs) - log_odds(pairs.rejected.log_probs)
    return -pairs.chosen.log_probs - loss.beta * logsigmoid(ratio)


def cpo(pairs: Pairs, loss: CpoLoss) -> torch.Tensor:
    """DPO whose reference finds everything equally likely, and likelihood."""
    preference = logsigmoid(loss.beta * (pairs.chosen.log_probs - pairs.rejected.log_probs))
    return -preference - loss.nll_coef * likelihood(pairs.chosen, average=loss.nll_average)


def apo_zero(pairs: Pairs, loss: ApoZeroLoss) -> torch.Tensor:
    """Each side is compared with the reference separately."""
    return 1 - (loss.beta * pairs.chosen.log_ratios).sigmoid() + (loss.beta * pairs.rejected.log_ratios).sigmoid()


def apo_down(pairs: Pairs, loss: ApoDownLoss) -> torch.Tensor:
    """Chosen against the reference, rejected against chosen."""
    return (loss.beta * pairs.chosen.log_ratios).sigmoid() + 1 - (loss.beta * pairs.h).sigmoid()


def rpo(pairs: Pairs, loss: RpoLoss) -> torch.Tensor:
    """DPO plus the chosen response's negative log-likelihood per token."""
    return -logsigmoid(loss.beta * pairs.h) - loss.nll_coef * likelihood(pairs.chosen, average=True)


def r_dpo(pairs: Pairs, loss: LengthPenalizedLoss) -> torch.Tensor:
    """The reward is modeled as beta * LR + length_coef * len; the policy learns only the first term."""
    longer = pairs.chosen.lengths - pairs.rejected.lengths
    return -logsigmoid(loss.beta * pairs.h + loss.length_coef * longer)


def discopop(pairs: Pairs, loss: DiscopopLoss) -> torch.Tensor:
    """m * exp(-z) as one exponential: apart, 0 * inf is NaN for a pair that is far on the wrong side."""
    z = loss.beta * pairs.h
    return -(-z / loss.tau).sigmoid() * logsigmoid(z) + (logsigmoid(z / loss.tau) - z).exp()


def likelihood(side: Side, *, average: bool) -> torch.Tensor:
    """[P]: log-prob of a whole response given as sums, or its mean per token."""
    return side.log_probs / side.lengths.clamp(min=1) if average else side.log_probs


def log_odds(log_p: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)); finite for any log p <= 0, and exact where p is close to 1.

    1 - p is -expm1(log p): 1 - exp(log p) would have no digits left there. p = 1 counts as 1 - 1e-6.
    """
    certain = -1e-6
    return log_p - (-log_p.clamp(max=certain).expm1()).log()


PAIR_LOSSES: Mapping[str, Callable[..., torch.Tensor]] = {
    "dpo": dpo,
    "cdpo": cdpo,
    "rdpo": rdpo,
    "ipo": ipo,
    "hinge": hinge,
    "simpo": simpo,
    "slic": slic,
    "orpo": orpo,
    "cpo": cpo,
    "apo-zero": apo_zero,
    "apo-down": apo_down,
    "rpo": rpo,
    "r-dpo": r_dpo,
    "ln-dpo": dpo,
    "discopop": discopop,
}
"""Type of the settings -> loss, called with pairs and those settings."""
