"""Where a run stands, and its checkpoints: saved after a step, restored when the run continues."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from rlhf.algorithms.base import Algorithm
from rlhf.engines.base import TrainEngine
from rlhf.orchestrator.run.checkpoint import Checkpoints, RunState
from rlhf.orchestrator.run.resume import ResumePoint
from rlhf.types import Role


class HasPosition(Protocol):
    """Rows that are read in order, and can be read again from a position."""

    position: int


class RunProgress:
    """The state after the last finished step. It is what a checkpoint holds, beside the trained models."""

    def __init__(
        self,
        fresh: RunState,
        algorithm: Algorithm,
        engines: Mapping[Role, TrainEngine],
        checkpoints: Checkpoints,
        *,
        pretraining_rows: HasPosition | None,
        every_steps: int,
        num_steps: int,
    ) -> None:
        """`fresh` is the state before the first step: seed, config, ranks and data fingerprint. Every `every_steps`
        steps are saved, and the last one, `num_steps`."""
        self.state = replace(fresh, algorithm=algorithm.state())
        self._algorithm = algorithm
        self._engines = engines
        self._checkpoints = checkpoints
        self._pretraining_rows = pretraining_rows
        self._every_steps = every_steps
        self._num_steps = num_steps
        self._saved_step = -1

    def advance(
        self, step: int, *, position: int, ahead: tuple[int, ...], num_updates: int, recent_updates: dict[str, str]
    ) -> None:
        """Step `step` is finished. It made `num_updates` optimizer steps, and the next one reads the data set from
        `position`, without the rows `ahead`. `recent_updates`: see `RunState`."""
        rows = self._pretraining_rows
        self.state = replace(
            self.state,
            step=step,
            position=position,
            ahead=ahead,
            pretraining_position=0 if rows is None else rows.position,
            num_updates=self.state.num_updates + num_updates,
            recent_updates=recent_updates,
            algorithm=self._algorithm.state(),
        )

    def save(self) -> None:
        """Save the last finished step, unless it is saved already."""
        if self._saved_step != self.state.step:
            self._checkpoints.save(self.state, self._engines)
            self._saved_step = self.state.step

    def save_if_due(self) -> None:
        """Save where the last finished step is one to save. Where the disk refuses, training goes on without this
        checkpoint, except at the last step."""
        step = self.state.step
        if step == self._num_steps:
            self.save()
        elif step % self._every_steps == 0 and self._checkpoints.try_save(self.state, self._engines):
            self._saved_step = step

    def restore(self, point: ResumePoint) -> None:
        """Load models, optimizers and state from a checkpoint.

        What may change between two starts (config, number of ranks, accepted data, limit of tokens, threads) stays as
        it is now.
        """
        for role, engine in self._engines.items():
            engine.load(point.path / role)
        self._algorithm.restore(point.state.algorithm)
        self.state = replace(
            point.state,
            config=self.state.config,
            ranks=self.state.ranks,
            data_fingerprint=self.state.data_fingerprint,
            token_limit=self.state.token_limit,
            threads=self.state.threads,
        )
        if self._pretraining_rows is not None:
            self._pretraining_rows.position = point.state.pretraining_position
        self._saved_step = point.state.step
