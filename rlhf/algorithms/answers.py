"""What credit sees of a rollout: the model's own tokens only; and the figures of a batch of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlhf.algorithms.advantages import Floats
from rlhf.errors import NumericsError
from rlhf.types import Example, FloatArray, LossMetrics, Signals


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One example's answer. Arrays have one entry a model token, in float64; None: not measured."""

    score: float
    truncated: bool
    old_log_probs: Floats
    values: Floats
    ref_log_probs: Floats | None = None
    sampler_log_probs: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.old_log_probs)

    @classmethod
    def of(cls, example: Example, signals: Signals) -> "Answer":
        """The answer of a one-sequence example. Raises NumericsError where a trainer's model said NaN or inf about a
        token; the sampler's log-probs are only compared."""
        mask = example.sequences[0].loss_mask

        def measured(arrays: tuple[FloatArray, ...], name: str) -> Floats:
            numbers = arrays[0][mask].astype(np.float64)
            wrong = len(numbers) - int(np.isfinite(numbers).sum())
            if wrong:
                raise NumericsError(f"{example.id}: {name}: {wrong} of {len(numbers)} tokens are not finite.")
            return numbers

        return cls(
            score=example.rewards[0],
            truncated=any(example.truncated),
            old_log_probs=measured(signals.old_log_probs, "old_log_probs"),
            values=measured(signals.values, "values"),
            ref_log_probs=measured(signals.ref_log_probs, "ref_log_probs") if signals.ref_log_probs else None,
            sampler_log_probs=example.sampler_log_probs[0][mask] if example.sampler_log_probs else None,
        )

    @property
    def kl(self) -> float:
        """KL to the reference over the answer, in nats: the unbiased estimate."""
        return 0.0 if self.ref_log_probs is None else float((self.old_log_probs - self.ref_log_probs).sum())


def mean(numbers: Sequence[float] | npt.NDArray[np.generic]) -> float:
    """The mean; of nothing: 0."""
    return float(np.mean(np.asarray(numbers, dtype=np.float64))) if len(numbers) else 0.0


def describe(answers: Sequence[Answer]) -> LossMetrics:
    """Figures of a rollout batch as it was sampled and scored. Lengths count model tokens. An answer without tokens
    (empty or aborted) is counted as such and nowhere else."""
    spoken = [answer for answer in answers if len(answer)]
    scores = np.array([answer.score for answer in spoken], dtype=np.float64)
    num_tokens = sum(len(answer) for answer in spoken)
    sums = {
        "reward/mean": mean(scores),
        "reward/std": float(scores.std()) if len(scores) else 0.0,
        "response/length": mean([len(answer) for answer in spoken]),
        "response/truncated": mean([answer.truncated for answer in spoken]),
        "response/empty": mean([not len(answer) for answer in answers]),
    }
    maxima = {"response/length_max": float(max((len(answer) for answer in spoken), default=0))}
    if all(answer.ref_log_probs is not None for answer in spoken):
        sums["kl/ref_per_response"] = mean([answer.kl for answer in spoken])
        sums["kl/ref_per_token"] = sum(answer.kl for answer in spoken) / max(num_tokens, 1)
    gaps = [np.abs(a.old_log_probs - a.sampler_log_probs) for a in spoken if a.sampler_log_probs is not None]
    if gaps:
        joined = np.concatenate(gaps)
        finite = joined[np.isfinite(joined)]
        sums["sampler/log_prob_gap"] = mean(finite)
        sums["sampler/not_finite"] = mean(~np.isfinite(joined))
        maxima["sampler/log_prob_gap_max"] = float(finite.max(initial=0.0))
    return LossMetrics(sums=sums, maxima=maxima)
