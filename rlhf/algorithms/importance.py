"""Importance weights for responses that were sampled with other weights, or other arithmetic, than the trainer's.

The sampler drew from q, the trainer's ratio is taken against its own p of the same tokens; p / q is the missing factor
of an unbiased gradient. It is never negative and has no gradient, so multiplying the advantages by it is the same as
multiplying the loss: w * min(ratio * A, clip(ratio) * A) = min(ratio * w * A, clip(ratio) * w * A).

`truncate` caps the weight: truncated importance sampling (TIS, Yao et al. 2025). `mask` sets weights outside a band to
0: IcePop (Ling Team 2025). `ratio` computes no p: the policy's ratio is taken against q, which is then the old policy.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rlhf.algorithms.advantages import Floats
from rlhf.algorithms.chunks import chunks, split
from rlhf.algorithms.kl import MAX_LOG_RATIO
from rlhf.algorithms.responses import ResponseTokens
from rlhf.config.algo import Correction, MaskedWeights, NoCorrection, RatioToSampler
from rlhf.errors import NumericsError
from rlhf.types import Example, FloatArray, Metrics, Signal, Signals

MAX_UNKNOWN = 0.001
"""Largest share of tokens whose log-probs the sampler may have failed to give."""


def with_old_policy(
    correction: Correction, examples: Sequence[Example], signals: Sequence[Signals]
) -> Sequence[Signals]:
    """`signals` with the log-probs of the old policy: the trainer's, or those that the sampler gave. Raises
    NumericsError where those are not finite."""
    if not isinstance(correction, RatioToSampler):
        return signals
    for example in examples:
        log_probs = example.sampler_log_probs[0][example.sequences[0].loss_mask]
        if not np.isfinite(log_probs).all():
            wrong = len(log_probs) - int(np.isfinite(log_probs).sum())
            raise NumericsError(
                f"sampler: {example.id}: {wrong} of {len(log_probs)} log-probs are not finite, and algo.correction "
                "ratio takes them for the old policy's. Look at the sampler's dtype, or choose another correction"
            )
    return [
        {**signal, Signal.OLD_LOG_PROBS: example.sampler_log_probs}
        for example, signal in zip(examples, signals, strict=True)
    ]


def importance_weights(correction: Correction, responses: Sequence[ResponseTokens]) -> tuple[list[Floats], Metrics]:
    """The weight of each token of each response: TIS or IcePop (see above), all 1 for the other corrections.

    A token whose sampler log-prob is NaN or inf has weight 0, and so has its whole response where weights are per
    sequence. Raises NumericsError where the share of such tokens exceeds MAX_UNKNOWN.
    """
    if isinstance(correction, NoCorrection | RatioToSampler):
        return [np.ones(len(response)) for response in responses], Metrics()
    lengths = [len(response) for response in responses]
    ratios, unknown, end = np.zeros(sum(lengths)), 0, 0
    for chunk in chunks(responses):
        sampled = np.concatenate([_sampled(response) for response in chunk])
        unknown += len(sampled) - int(np.count_nonzero(np.isfinite(sampled)))
        start, end = end, end + len(sampled)
        ratios[start:end] = _ratios(chunk, sampled, correction.level)
    if unknown > MAX_UNKNOWN * len(ratios):
        raise NumericsError(
            f"sampler: {unknown} of {len(ratios)} log-probs are not finite, so their importance weights are unknown. "
            "Look at the sampler's dtype; algo.correction.type none learns without weights"
        )
    if isinstance(correction, MaskedWeights):
        weights = np.where((ratios >= correction.low) & (ratios <= correction.high), ratios, 0.0)
    else:
        weights = np.minimum(ratios, correction.cap)
    return split(weights, lengths), _metrics(weights, ratios)


def _sampled(response: ResponseTokens) -> npt.NDArray[np.float32]:
    if response.sampler_log_probs is None:
        raise ValueError("importance weights need sampler_log_probs, which the example does not hold")
    return response.sampler_log_probs


def _ratios(responses: Sequence[ResponseTokens], sampled: FloatArray, level: str) -> Floats:
    """p / q of each token, or of its whole response, of the responses one after the other; 0 where q, whose logarithms
    are `sampled`, is unknown."""
    gap: Floats = np.concatenate([response.old_log_probs for response in responses]) - sampled.astype(np.float64)
    if level == "sequence":
        lengths = np.array([len(response) for response in responses])
        gap = np.repeat([of_response.sum() for of_response in split(gap, lengths.tolist())], lengths)
    known = np.isfinite(gap)
    clamped = np.clip(np.where(known, gap, 0.0), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return np.where(known, np.exp(clamped), 0.0)


def _metrics(weights: Floats, ratios: Floats) -> Metrics:
    """Over tokens: the mean weight, the share of weights that were cut, and the effective sample size (Kish 1965)
    as a share of the tokens."""
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
