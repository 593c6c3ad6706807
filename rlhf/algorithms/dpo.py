"""Direct preference optimization on given pairs (Rafailov et al. 2023, arXiv:2305.18290) and its variants."""

from collections.abc import Mapping, Sequence

from rlhf.algorithms.base import Algorithm, Objective
from rlhf.algorithms.needs import dpo_needs
from rlhf.algorithms.pairs import PairObjective, PairPicker, pair_experience
from rlhf.algorithms.stuck_loss import STARTS_AT_LN_2, StuckLossWatch
from rlhf.config.algo import DpoSection
from rlhf.types import Example, Experience, Json, Metrics, Role, ScoredGroup, Signal, Signals


class DPO(Algorithm):
    """The policy learns to prefer chosen over rejected more than the reference does. Of a ranking of several responses,
    the best and the worst are the pair."""

    def __init__(self, section: DpoSection) -> None:
        loss = section.loss
        self._picker = PairPicker(from_policy=False)
        self._objective = PairObjective(loss)
        self._standstill = StuckLossWatch(watches=loss.type in STARTS_AT_LN_2)
        self.needs = dpo_needs(section)

    def select(self, groups: Sequence[ScoredGroup]) -> list[Example]:
        """One pair per prompt."""
        return self._picker.pick(groups)

    def credit(self, examples: Sequence[Example], signals: Sequence[Signals]) -> tuple[list[Experience], Metrics]:
        """Label the two sides."""
        experiences = [
            pair_experience(example, signal.get(Signal.REF_LOG_PROBS, ()))
            for example, signal in zip(examples, signals, strict=True)
        ]
        return experiences, Metrics(sums=self._picker.dropped(), warnings=self._standstill.warnings())

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
