"""What learning keeps in memory."""

import weakref
from collections.abc import Sequence

import numpy as np

from rlhf.algorithms.grpo import GRPO
from rlhf.config.algo import GrpoSection
from rlhf.config.run import TrainSection
from rlhf.engines.base import PassReport
from rlhf.engines.fakes import FakeTrainEngine
from rlhf.orchestrator.run.schedule import RunLength
from rlhf.orchestrator.step.learning import Learner
from rlhf.orchestrator.step.token_scores import Models, plan_step
from rlhf.types import (
    Example,
    Experience,
    Head,
    LearnedSequence,
    Role,
    Signal,
    TokenSequence,
    TrainBatch,
)


class Forgetful(FakeTrainEngine):
    """Keeps no batch, and counts how many optimizer steps' arrays there are while it learns."""

    def __init__(self) -> None:
        super().__init__(np.zeros(10), Head.LOG_PROBS)
        self.alive: list[int] = []
        self._arrays: list[weakref.ref[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]] = []

    def forward_backward(self, batches: Sequence[TrainBatch]) -> PassReport:
        self._arrays.append(weakref.ref(batches[0].signals[Signal.ADVANTAGES]))
        self.alive.append(sum(array() is not None for array in self._arrays))
        return PassReport()


def test_the_arrays_of_one_optimizer_step_are_there_at_a_time() -> None:
    token_ids, mask = np.arange(4), np.array([False, False, True, True])
    signals = {Signal.ADVANTAGES: np.ones(4, dtype=np.float32)}
    sequences = [TokenSequence(token_ids=token_ids, loss_mask=mask)]
    examples = [Example(id=str(i), sequences=tuple(sequences), rewards=(0.0,)) for i in range(6)]
    learned = LearnedSequence(token_ids=token_ids, loss_mask=mask, signals=signals)
    experiences = [Experience(id=str(i), sequences=(learned,)) for i in range(6)]
    engine, train = Forgetful(), TrainSection(batch_size=2, max_tokens_per_micro_batch=8)
    length = RunLength(num_steps=1, examples_per_step=6, batch_size=2)
    learner = Learner({Role.POLICY: engine}, GRPO(GrpoSection()), train, length, seed=0, note=lambda *_, **__: None)
    plan = plan_step(1, examples, Models(trained={Role.POLICY: engine}), train, seed=0)
    assert learner.learn(1, experiences, plan).num_updates == 3
    assert engine.alive == [1, 1, 1]
