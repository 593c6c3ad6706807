"""Importance weights for responses that were sampled with other weights, or other arithmetic, than the trainer's.

The sampler drew from q, the trainer's ratio is taken against its own p of the same tokens; p / q is the missing factor
of an unbiased gradient. It is never negative and has no gradient, so multiplying the advantages by it is the same as
multiplying the loss: w * min(ratio * A, clip(ratio) * A) = min(ratio * w * A, clip(ratio) * w * A).

`truncate` caps the weight: truncated importance sampling (TIS, Yao et al. 2025). `mask` sets weights outside a band to
0: IcePop (Ling Team 2025). `ratio` computes no p: the policy's ratio is taken against q, which is then the old policy.
"""

from collections.abc import Sequence

import numpy as np
import torch

from rlhf.algorithms.advantages import Floats
from rlhf.algorithms.base import TensorBatch
from rlhf.algorithms.chunks import chunks, split
from rlhf.algorithms.kl import MAX_LOG_RATIO
from rlhf.algorithms.losses import present, sequence_totals
from rlhf.algorithms.responses import ResponseTokens
from rlhf.config.algo import Correction, MaskedWeights, NoCorrection, RatioToSampler, TruncatedWeights
from rlhf.errors import NumericsError
from rlhf.types import Example, FloatArray, Metrics, Signal, Signals

MAX_UNKNOWN = 0.001
"""Largest share of tokens whose log-probs the sampler may have failed to give."""


def with_sampler(correction: Correction, examples: Sequence[Example], signals: Sequence[Signals]) -> Sequence[Signals]:
    """`signals` with the log-probs that the sampler gave, where the loss reads them: for weights, or in place of the
    trainer's log-probs by the old policy.

    Raises NumericsError where too many of them are not finite: more than a share of MAX_UNKNOWN for weights, any in
    place of the trainer's.
    """
    if isinstance(correction, NoCorrection):
        return signals
    of_sampler = Signal.OLD_LOG_PROBS if isinstance(correction, RatioToSampler) else Signal.SAMPLER_LOG_PROBS
    if isinstance(correction, RatioToSampler):
        _require_all_known(examples)
    else:
        _require_most_known(examples)
    return [
        {**signal, of_sampler: example.sampler_log_probs} for example, signal in zip(examples, signals, strict=True)
    ]


def _require_all_known(examples: Sequence[Example]) -> None:
    for example in examples:
        log_probs = example.sampler_log_probs[0][example.sequences[0].loss_mask]
        if not np.isfinite(log_probs).all():
            wrong = len(log_probs) - int(np.isfinite(log_probs).sum())
            raise NumericsError(
                f"sampler: {example.id}: {wrong} of {len(log_probs)} log-probs are not finite, and algo.correction "
                "ratio takes them for the old policy's. Look at the sampler's dtype, or choose another correction"
            )


def _require_most_known(examples: Sequence[Example]) -> None:
    unknown, num_tokens = 0, 0
    for example in examples:
        if not example.sampler_log_probs:
            raise ValueError(f"importance weights need sampler_log_probs, which example {example.id} does not hold")
        log_probs = example.sampler_log_probs[0][example.sequences[0].loss_mask]
        unknown += len(log_probs) - int(np.count_nonzero(np.isfinite(log_probs)))
        num_tokens += len(log_probs)
    if unknown > MAX_UNKNOWN * num_tokens:
        raise NumericsError(
            f"sampler: {unknown} of {num_tokens} log-probs are not finite, so their importance weights are unknown. "
            "Look at the sampler's dtype; algo.correction.type none learns without weights"
        )


def batch_weights(correction: Correction, old_log_probs: torch.Tensor, batch: TensorBatch) -> torch.Tensor:
    """[T]: the weight of each token of a micro-batch, 0 where not learned from; `old_log_probs` are [T]. All 1 for
    corrections without weights."""
    mask = batch.loss_mask
    if isinstance(correction, NoCorrection | RatioToSampler):
        return mask.to(old_log_probs.dtype)
    sampled = present(batch, Signal.SAMPLER_LOG_PROBS)[mask]
    gap: Floats = (old_log_probs[mask].double() - sampled.double()).cpu().numpy()
    lengths = sequence_totals(mask.long(), batch.lengths).tolist()
    weights = _capped(correction, _ratios(gap, lengths, correction.level))
    return torch.zeros_like(old_log_probs).masked_scatter(mask, torch.from_numpy(weights).to(old_log_probs))


def importance_weights(correction: Correction, responses: Sequence[ResponseTokens]) -> tuple[list[Floats], Metrics]:
    """The weight of each token of each response: TIS or IcePop (see above), all 1 for the other corrections; and what
    there is to say about them.

    A token whose sampler log-prob is NaN or inf has weight 0, and so has its whole response where weights are per
    sequence.
    """
    if isinstance(correction, NoCorrection | RatioToSampler):
        return [np.ones(len(response)) for response in responses], Metrics()
    lengths = [len(response) for response in responses]
    ratios, end = np.zeros(sum(lengths)), 0
    for chunk in chunks(responses):
        gap = np.concatenate([response.old_log_probs - _sampled(response).astype(np.float64) for response in chunk])
        start, end = end, end + len(gap)
        ratios[start:end] = _ratios(gap, [len(response) for response in chunk], correction.level)
    weights = _capped(correction, ratios)
    return split(weights, lengths), _metrics(weights, ratios)


def _sampled(response: ResponseTokens) -> FloatArray:
    if response.sampler_log_probs is None:
        raise ValueError("importance weights need sampler_log_probs, which the example does not hold")
    return response.sampler_log_probs


def _ratios(gap: Floats, lengths: Sequence[int], level: str) -> Floats:
    """p / q of each token, or of its whole response, of responses of these lengths one after the other; `gap` is
    log(p / q). 0 where q is unknown."""
    if level == "sequence":
        gap = np.repeat([of_response.sum() for of_response in split(gap, lengths)], lengths)
    known = np.isfinite(gap)
    clamped = np.clip(np.where(known, gap, 0.0), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return np.where(known, np.exp(clamped), 0.0)


def _capped(correction: TruncatedWeights | MaskedWeights, ratios: Floats) -> Floats:
    """The weights that ratios p / q become."""
    if isinstance(correction, MaskedWeights):
        return np.where((ratios >= correction.low) & (ratios <= correction.high), ratios, 0.0)
    return np.minimum(ratios, correction.cap)


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
