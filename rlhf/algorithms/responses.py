"""The tokens of a response that the model wrote, as credit reads them; and their KL to the reference."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from rlhf.algorithms.advantages import Floats
from rlhf.algorithms.sequences import learned
from rlhf.errors import NumericsError
from rlhf.types import Example, FloatArray, LearnedSequence, Metrics, Signal, Signals


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseTokens:
    """One example's response. Arrays have one entry per model token, in float64; None: not computed. `values` is empty
    where there is no critic; `old_log_probs` are NaN where they come with the pass that learns."""

    score: float
    old_log_probs: Floats
    values: Floats
    ref_log_probs: Floats | None = None
    sampler_log_probs: FloatArray | None = None
    truncated: bool = False
    turns: tuple[tuple[int, float], ...] = ()
    """The index of each turn's last token among these, and what the turn earned of the score."""
    earned_before: float = 0.0
    """What turns earned of the score that ended before the first of these tokens."""

    def __len__(self) -> int:
        return len(self.old_log_probs)

    @classmethod
    def of(cls, example: Example, signals: Signals) -> "ResponseTokens":
        """The response of a one-sequence example. Raises NumericsError where a model's output is NaN or inf at a
        token; the sampler's log-probs are not checked here."""
        mask = example.sequences[0].loss_mask

        def at_tokens(signal: Signal) -> Floats:
            numbers = signals[signal][0][mask].astype(np.float64)
            wrong = len(numbers) - np.count_nonzero(np.isfinite(numbers))
            if wrong:
                raise NumericsError(f"{example.id}: {signal}: {wrong} of {len(numbers)} tokens are not finite.")
            return numbers

        own = np.flatnonzero(mask)
        return cls(
            score=example.rewards[0],
            old_log_probs=at_tokens(Signal.OLD_LOG_PROBS)
            if Signal.OLD_LOG_PROBS in signals
            else np.full(len(own), np.nan),
            values=at_tokens(Signal.VALUES) if Signal.VALUES in signals else np.zeros(0),
            ref_log_probs=at_tokens(Signal.REF_LOG_PROBS) if Signal.REF_LOG_PROBS in signals else None,
            sampler_log_probs=example.sampler_log_probs[0][mask] if example.sampler_log_probs else None,
            truncated=any(example.truncated),
            turns=_among(own, example.turns) if example.turns else (),
            earned_before=sum(earned for end, earned in example.turns if len(own) and end < own[0]),
        )

    @property
    def kl(self) -> float:
        """KL to the reference over the response, in nats: the unbiased estimate."""
        return 0.0 if self.ref_log_probs is None else float((self.old_log_probs - self.ref_log_probs).sum())


def responses_of(examples: Sequence[Example], signals: Sequence[Signals]) -> list[ResponseTokens]:
    """The responses of one-sequence examples. Raises NumericsError as `ResponseTokens.of`."""
    return [ResponseTokens.of(example, signal) for example, signal in zip(examples, signals, strict=True)]


def _among(own: npt.NDArray[np.intp], turns: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """The ends of turns as indices into the model's own tokens; of one that is not learned from, at the token before
    it that is. Turns before all of them are left out: no token had a part in what was earned before it."""
    if not len(own):
        return ()
    return tuple((int(np.searchsorted(own, end, side="right")) - 1, earned) for end, earned in turns if end >= own[0])


def mean(numbers: Sequence[float] | npt.NDArray[np.generic]) -> float:
    """The mean; of nothing: 0."""
    return float(np.mean(np.asarray(numbers, dtype=np.float64))) if len(numbers) else 0.0


def ref_kl_metrics(responses: Sequence[ResponseTokens]) -> Metrics:
    """KL to the reference, where there is one, over the responses that hold a token."""
    non_empty = [response for response in responses if len(response)]
    if any(response.ref_log_probs is None for response in non_empty):
        return Metrics()
    kls = [response.kl for response in non_empty]
    num_tokens = sum(len(response) for response in non_empty)
    return Metrics(sums={"kl/ref_per_response": mean(kls), "kl/ref_per_token": sum(kls) / max(num_tokens, 1)})


def num_learned(response: ResponseTokens, truncated: Literal["learn", "mask", "bootstrap"]) -> int:
    """How many of the response's tokens are learned from, counted from the first: `truncated` says what is done with a
    truncated response. To bootstrap is to give up its last token, whose value stands for all that would have come."""
    if not response.truncated or truncated == "learn":
        return len(response)
    return max(len(response) - 1, 0) if truncated == "bootstrap" else 0


def with_credit(
    example: Example,
    signals: Signals,
    advantages: Floats,
    *,
    returns: Floats | None = None,
    num_tokens: int | None = None,
) -> LearnedSequence:
    """A one-sequence example's sequence with advantages and returns: one number for each model token, or one for
    all. `num_tokens` learns from that many model tokens alone, counted from the first."""
    (sequence,) = example.sequences
    loss_mask = sequence.loss_mask
    if num_tokens is not None and num_tokens < np.count_nonzero(loss_mask):
        first = np.flatnonzero(loss_mask)[:num_tokens]
        loss_mask = np.zeros_like(loss_mask)
        loss_mask[first] = True

    def on_tokens(numbers: Floats) -> FloatArray:
        aligned = np.zeros(len(sequence), dtype=np.float32)
        aligned[loss_mask] = numbers
        return aligned

    of_models = {signal: arrays[0] for signal, arrays in signals.items()}
    credit = {Signal.ADVANTAGES: on_tokens(advantages)}
    if returns is not None:
        credit[Signal.RETURNS] = on_tokens(returns)
    return learned(replace(sequence, loss_mask=loss_mask), {**of_models, **credit})
