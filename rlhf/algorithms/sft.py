"""Supervised fine-tuning: maximum likelihood of demonstrations."""

from collections.abc import Mapping, Sequence

from rlhf.algorithms.base import Algorithm, LossOutput, Objective, Outputs, TensorBatch
from rlhf.algorithms.losses import negative_log_likelihood, to_metrics
from rlhf.algorithms.needs import sft_needs
from rlhf.algorithms.response_metrics import length_metrics
from rlhf.algorithms.sequences import is_empty, join, learned
from rlhf.config.algo import SftSection
from rlhf.types import (
    Example,
    Experience,
    Metrics,
    Role,
    ScoredGroup,
    Signals,
)


class SFT(Algorithm):
    """-sum_t lp_t over the tokens of the response, over all response tokens of the step: the policy imitates; in a
    conversation, the assistant's turns only."""

    def __init__(self, section: SftSection) -> None:
        self.needs = sft_needs(section)

    def keep(self, group: ScoredGroup) -> bool:
        """Whether there is anything to imitate."""
        return any(not is_empty(group.prompt, response) for response in group.responses)

    def select(self, groups: Sequence[ScoredGroup]) -> list[Example]:
        """One example a demonstration."""
        return [
            Example(id=response.id, sequences=(join(group.prompt, response),), rewards=())
            for group in groups
            for response in group.responses
        ]

    def credit(self, examples: Sequence[Example], signals: Sequence[Signals]) -> tuple[list[Experience], Metrics]:
        experiences = [
            Experience(
                id=example.id,
                sequences=tuple(map(learned, example.sequences)),
            )
            for example in examples
        ]
        lengths = [int(sequence.loss_mask.sum()) for example in examples for sequence in example.sequences]
        return experiences, Metrics(sums=length_metrics(lengths))

    def objectives(self) -> Mapping[str, Objective]:
        return {Role.POLICY: self._policy_loss}

    def _policy_loss(self, outputs: Outputs, batch: TensorBatch) -> LossOutput:
        loss = negative_log_likelihood(outputs.predictions, batch)
        return LossOutput(loss=loss, metrics=to_metrics({"policy/loss": loss}))
