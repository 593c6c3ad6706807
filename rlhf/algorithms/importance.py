"""Importance weights: what was sampled by other weights, or by other arithmetic, than the trainer's.

The sampler drew from q, the trainer's ratio is taken against its own p of the same tokens; p / q is the missing factor
of an unbiased gradient. It is never negative and has no gradient, so multiplying the advantages by it is the same as
multiplying the loss: w * min(ratio * A, clip(ratio) * A) = min(ratio * w * A, clip(ratio) * w * A).

Or the ratio is taken against q in the first place, and p is never measured: q is then the old policy.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rlhf.algorithms.advantages import Floats
from rlhf.algorithms.kl import MAX_LOG_RATIO
from rlhf.algorithms.responses import ResponseTokens
from rlhf.config.algo import Correction, MaskedWeights, NoCorrection, RatioToSampler
from rlhf.errors import NumericsError
from rlhf.types import Example, Metrics, Signal, Signals

MAX_UNKNOWN = 0.001
"""Largest share of tokens whose log-probs the sampler may have failed to give."""


def old_policy_signals(correction: Correction) -> frozenset[Signal]:
    """What the trainer computes about the old policy: its log-probs, unless the sampler's take their place."""
    return frozenset() if isinstance(correction, RatioToSampler) else frozenset({Signal.OLD_LOG_PROBS})


def with_old_policy(
    correction: Correction, examples: Sequence[Example], signals: Sequence[Signals]
) -> Sequence[Signals]:
    """`signals` with the log-probs of the old policy: the trainer's, or those that the sampler gave. Raises
    NumericsError where those are not finite."""
    if not isinstance(correction, RatioToSampler):
        return signals
    for example in examples:
        said = example.sampler_log_probs[0][example.sequences[0].loss_mask]
        if not np.isfinite(said).all():
            wrong = len(said) - int(np.isfinite(said).sum())
            raise NumericsError(
                f"sampler: {example.id}: {wrong} of {len(said)} log-probs are not finite, and algo.correction ratio "
                "takes them for the old policy's. Look at the sampler's dtype, or choose another correction"
            )
    return [
        {**signal, Signal.OLD_LOG_PROBS: example.sampler_log_probs}
        for example, signal in zip(examples, signals, strict=True)
    ]


def importance_weights(correction: Correction, answers: Sequence[ResponseTokens]) -> tuple[list[Floats], Metrics]:
    """The weight of each token of each answer (Yao et al. 2025), all 1 without a correction beside the ratio.

    A token whose log-prob the sampler gave as NaN or inf has a weight that nobody knows: it gets 0, with its whole
    answer where weights are those of answers. Raises NumericsError where that happens to more than a few tokens.
    """
    if isinstance(correction, NoCorrection | RatioToSampler):
        return [np.ones(len(answer)) for answer in answers], Metrics()
    ratios = [_ratios(answer, correction.level) for answer in answers]
    joined = np.concatenate([*ratios, np.zeros(0)])
    unknown = sum(int((~np.isfinite(_sampled(answer))).sum()) for answer in answers)
    if unknown > MAX_UNKNOWN * len(joined):
        raise NumericsError(
            f"sampler: {unknown} of {len(joined)} log-probs are not finite, so their importance weights are unknown. "
            "Look at the sampler's dtype; algo.correction.type none learns without weights"
        )
    if isinstance(correction, MaskedWeights):
        inside = [(ratio >= correction.low) & (ratio <= correction.high) for ratio in ratios]
        weights = [np.where(kept, ratio, 0.0) for kept, ratio in zip(inside, ratios, strict=True)]
    else:
        weights = [np.minimum(ratio, correction.cap) for ratio in ratios]
    return weights, _figures(np.concatenate([*weights, np.zeros(0)]), joined)


def _sampled(answer: ResponseTokens) -> npt.NDArray[np.float32]:
    if answer.sampler_log_probs is None:
        raise ValueError("importance weights need sampler_log_probs, which the example does not hold")
    return answer.sampler_log_probs


def _ratios(answer: ResponseTokens, level: str) -> Floats:
    """p / q of each token, or of the whole answer at each token; 0 where q is unknown."""
    gap: Floats = answer.old_log_probs - _sampled(answer).astype(np.float64)
    if level == "sequence":
        gap = np.full(len(answer), gap.sum())
    known = np.isfinite(gap)
    clamped = np.clip(np.where(known, gap, 0.0), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return np.where(known, np.exp(clamped), 0.0)


def _figures(weights: Floats, ratios: Floats) -> Metrics:
    """Over tokens: the mean weight, the share of weights that were cut, and how many equally weighted tokens the
    weighted ones are worth (Kish 1965), as a share."""
    if not len(weights):
        return Metrics()
    squares = float(np.square(weights).sum())
    return Metrics(
        sums={
            "importance/weight": float(weights.mean()),
            "importance/cut": float((weights != ratios).mean()),
            "importance/effective": float(weights.sum() ** 2 / (len(weights) * squares)) if squares else 0.0,
        },
        maxima={"importance/ratio_max": float(ratios.max())},
    )
