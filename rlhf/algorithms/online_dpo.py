"""Online DPO: preferences between the policy's own responses (Guo et al. 2024, arXiv:2402.04792), with the references
of BPO (Xu et al. 2024) and the mixture of IPO-MD (Calandriello et al. 2024)."""

from collections.abc import Mapping, Sequence

from rlhf.algorithms.base import Algorithm, Objective
from rlhf.algorithms.needs import online_dpo_needs
from rlhf.algorithms.pairs import PairObjective, PairPicker, pair_experience
from rlhf.algorithms.responses import mean
from rlhf.algorithms.stuck_loss import STARTS_AT_LN_2, StuckLossWatch
from rlhf.config.algo import OnlineDpoSection
from rlhf.types import Example, Experience, FloatArray, Json, Metrics, Role, ScoredGroup, Signal, Signals


class OnlineDPO(Algorithm):
    """The best response of each group against its worst. A group whose responses all have the same reward is dropped
    and counted; none is sampled in its place."""

    def __init__(self, section: OnlineDpoSection) -> None:
        self._picker = PairPicker(from_policy=not section.mixture)
        self._objective = PairObjective(section.loss)
        # A reference that follows the policy takes the loss back to ln 2 again and again.
        self._standstill = StuckLossWatch(watches=section.reference == "frozen" and section.loss.type in STARTS_AT_LN_2)
        own_reference = section.reference == "behavior"
        self._reference_signal = Signal.OLD_LOG_PROBS if own_reference else Signal.REF_LOG_PROBS
        self.needs = online_dpo_needs(section)

    def select(self, groups: Sequence[ScoredGroup]) -> list[Example]:
        """One pair per prompt."""
        return self._picker.pick(groups)

    def credit(self, examples: Sequence[Example], signals: Sequence[Signals]) -> tuple[list[Experience], Metrics]:
        """Label the two sides, with the reference's log-probs."""
        experiences = [
            pair_experience(example, signal[self._reference_signal])
            for example, signal in zip(examples, signals, strict=True)
        ]
        sums = {
            **self._picker.dropped(),
            "pairs/score_gap": mean([example.rewards[0] - example.rewards[1] for example in examples]),
        }
        return experiences, Metrics(sums=sums, warnings=self._standstill.warnings())

    def describe(self, examples: Sequence[Example], signals: Sequence[Signals]) -> Metrics:
        """The KL to the reference."""
        return Metrics(sums=distance(examples, signals))

    def objectives(self) -> Mapping[str, Objective]:
        return {Role.POLICY: self._objective}

    def after_pass(self, metrics: Metrics) -> bool:
        """Watch for a loss that stands still."""
        self._standstill.observe(metrics.sums.get("policy/loss"))
        return True

    def state(self) -> dict[str, Json]:
        return self._standstill.state()

    def restore(self, state: Mapping[str, Json]) -> None:
        self._standstill.restore(state)


def distance(examples: Sequence[Example], signals: Sequence[Signals]) -> dict[str, float]:
    """KL of the policy to the reference (k1) over the paired responses, where both were computed."""
    kls: list[FloatArray] = [
        (old - ref)[sequence.loss_mask].astype("float64")
        for example, signal in zip(examples, signals, strict=True)
        if Signal.OLD_LOG_PROBS in signal and Signal.REF_LOG_PROBS in signal
        for sequence, old, ref in zip(
            example.sequences, signal[Signal.OLD_LOG_PROBS], signal[Signal.REF_LOG_PROBS], strict=True
        )
    ]
    num_tokens = sum(len(kl) for kl in kls)
    if not num_tokens:
        return {}
    total = float(sum(kl.sum() for kl in kls))
    return {"kl/ref_per_response": total / len(kls), "kl/ref_per_token": total / num_tokens}
