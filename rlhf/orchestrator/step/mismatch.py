"""Sampler against trainer: how far the two disagree about the same tokens, and when that warns or ends a run."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rlhf.config.run import TrainSection
from rlhf.errors import NumericsError
from rlhf.types import Example, FloatArray, Signal, Signals

MAX_GAP = 20.0
"""Nats at which a disagreement is cut before `exp`."""

PIECE = 2**14
"""Tokens whose temporary arrays fit a core's cache."""


def log_prob_mismatch(examples: Sequence[Example], signals: Sequence[Signals]) -> FloatArray:
    """Log-prob by the trainer minus that by the sampler, of each response token that both computed. Not finite where
    one of the two is not."""
    gaps = [
        (old - sampler)[sequence.loss_mask]
        for example, signal in zip(examples, signals, strict=True)
        if Signal.OLD_LOG_PROBS in signal and example.sampler_log_probs
        for sequence, old, sampler in zip(
            # A sequence beyond the sampler's log-probs was not sampled (KTO's mismatched responses).
            example.sequences,
            signal[Signal.OLD_LOG_PROBS],
            example.sampler_log_probs,
            strict=False,
        )
    ]
    joined: FloatArray = np.concatenate(gaps) if gaps else np.zeros(0, dtype=np.float32)
    return joined


def mismatch_metrics(gap: FloatArray, mismatch_band: float) -> dict[str, float]:
    """How far sampler and trainer disagree about the same tokens; `gap` is log(trainer / sampler) of each, in nats.

    The KL of sampler to trainer is estimated from the sampler's own tokens (k3, Schulman 2020). A token is
    outside the band where one of the two probabilities is more than `mismatch_band` times the other.
    """
    if not len(gap):
        return {}
    distances = gap[np.isfinite(gap)].astype(np.float64)
    size = max(len(distances), 1)
    kls = np.empty_like(distances)
    # Piece by piece and in place: the arrays hold all tokens of a step.
    for start in range(0, len(distances), PIECE):
        clamped = distances[start : start + PIECE].clip(-MAX_GAP, MAX_GAP)
        kl = np.expm1(clamped, out=kls[start : start + PIECE])
        kl -= clamped
    np.abs(distances, out=distances)
    return {
        "mismatch/log_prob": float(distances.sum() / size),
        "mismatch/log_prob_max": float(distances.max(initial=0.0)),
        "mismatch/kl": float(kls.sum() / size),
        "mismatch/outside_band": float((distances > np.log(mismatch_band)).sum() / size),
        "mismatch/not_finite": 1.0 - len(distances) / len(gap),
    }


class MismatchWatch:
    """Warns once, then ends the run, where sampler and trainer disagree by more than the config allows."""

    def __init__(self, train: TrainSection, warn: Callable[[str], None]) -> None:
        """The bounds are `train.mismatch_warn` and `train.mismatch_stop`; `warn` shows a warning to the user."""
        self._mismatch_warn = train.mismatch_warn
        self._mismatch_stop = train.mismatch_stop
        self._warn = warn
        self._warned: set[str] = set()

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Check the result of `mismatch_metrics`. Raises NumericsError above `train.mismatch_stop`."""
        mean = metrics.get("mismatch/log_prob", 0.0)
        text = f"step {step}: log-probs of sampler and trainer differ by {mean:.3g} nats a token on average"
        if 0 < self._mismatch_stop < mean:
            raise NumericsError(
                f"{text} (train.mismatch_stop is {self._mismatch_stop:g}). Compare dtypes and sampling; with "
                "rollout.max_lag above 0, lower it or the learning rate"
            )
        if 0 < self._mismatch_warn < mean:
            self._warn_once("gap", f"{text} (train.mismatch_warn is {self._mismatch_warn:g}); shown once")
        unknown = metrics.get("mismatch/not_finite", 0.0)
        if unknown > 0:
            # These tokens are in no mean: a sampler that returns nothing finite would seem to agree.
            text = f"step {step}: {unknown:.2%} of the sampler's log-probs are not finite; shown once"
            self._warn_once("unknown", text)

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            self._warn(text)
