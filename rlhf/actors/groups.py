"""Groups of workers that act as one engine: a batch is split over ranks, the parts are put together again."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, cast

import ray
from ray.exceptions import RayError

from rlhf.actors.calls import Call, Worker, answers, first_line, traffic
from rlhf.errors import INFRASTRUCTURE, RlhfError, WorkerLostError
from rlhf.types import FloatArray, Metrics, PackedTokens, Role, StepReport, SyncReport, TrainBatch

Item = TypeVar("Item")
Submit = Callable[[int, "ray.actor.ActorHandle"], "ray.ObjectRef[object]"]
Replace = Callable[[Sequence[Worker], RlhfError], Sequence[Worker]]
"""Gives new processes for those that were lost, and takes what lost them."""


class WorkerGroup:
    """The processes of one device group, rank by rank.

    Every rank must run the same calls in the same order, or their collectives wait for each other for ever. Callers
    are threads of the driver, so a lock makes one call reach all ranks before the next one does.
    """

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = tuple(workers)
        self._submitting = threading.Lock()

    def run(self, submit: Submit, *, phase: str, timeout_s: float) -> list[object]:
        """Call every rank through `submit(rank, handle)` and wait for all answers, in rank order.

        Raises: as `wait_all`.
        """
        return self._ask(self.workers, submit, phase, timeout_s)

    def _ask(self, workers: Sequence[Worker], submit: Submit, phase: str, timeout_s: float) -> list[object]:
        with traffic.waiting(phase):
            with self._submitting:
                calls = self._calls(workers, submit, phase)
            return answers(calls, phase=phase, timeout_s=timeout_s)

    def _calls(self, workers: Sequence[Worker], submit: Submit, phase: str) -> list[Call]:
        try:
            return [Call(worker=worker, ref=submit(rank, worker.handle)) for rank, worker in enumerate(workers)]
        except RayError as error:  # no room for what they are given, or one is known to be dead
            raise WorkerLostError(f"{phase}: could not be asked: {first_line(error)}") from error


class ReplaceableGroup(WorkerGroup):
    """Processes that hold nothing that others cannot be given: what they loaded, or weights that can be sent again.
    Where one of them is lost, others take all their seats, are given the same and asked the same; what they answer is
    what the first would have answered.

    They are asked once: a question that costs a second set of processes too is answered by the error.
    """

    def __init__(self, workers: Sequence[Worker], replace: Replace) -> None:
        super().__init__(workers)
        self._replace = replace
        self._replacing = threading.Lock()

    def run(self, submit: Submit, *, phase: str, timeout_s: float) -> list[object]:
        """As for any group. Raises: as `wait_all`, for the processes that came instead; and as their start, where none
        came."""
        asked = self.workers
        try:
            return self._ask(asked, submit, phase, timeout_s)
        except INFRASTRUCTURE as error:
            with self._replacing:
                if self.workers is asked:  # else another thread has met the same loss
                    self.workers = tuple(self._others(asked, error))
        return self._ask(self.workers, submit, phase, timeout_s)

    def _others(self, lost: Sequence[Worker], error: RlhfError) -> Sequence[Worker]:
        try:
            return self._replace(lost, error)
        except INFRASTRUCTURE as worse:
            raise type(worse)(f"{error} None came instead: {worse}") from error


class GroupEngine:
    """One role of a worker group, as a `TrainEngine`: what the loop holds of a policy, critic or reference."""

    def __init__(self, group: WorkerGroup, role: Role, *, step_timeout_s: float, sync_timeout_s: float) -> None:
        self.group = group
        self.role = role
        self.num_ranks = len(group.workers)
        self._step_timeout_s = step_timeout_s
        self._sync_timeout_s = sync_timeout_s

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        parts = self._split(batches)
        answers = self._run("forward", lambda rank, handle: handle.forward.remote(self.role, parts[rank]))
        return [array for part in answers for array in cast(list[FloatArray], part)]

    def forward_backward(self, batches: Sequence[TrainBatch]) -> Metrics:
        parts = self._split(batches)
        answers = self._run(
            "forward_backward", lambda rank, handle: handle.forward_backward.remote(self.role, parts[rank])
        )
        return sum(cast(list[Metrics], answers), Metrics())

    def optim_step(self) -> StepReport:
        answers = self._run("optim_step", lambda _rank, handle: handle.optim_step.remote(self.role))
        return cast(StepReport, answers[0])

    def send_weights(self, version: int) -> SyncReport:
        answers = self.group.run(
            lambda _rank, handle: handle.send_weights.remote(self.role, version),
            phase=f"weight sync of version {version}",
            timeout_s=self._sync_timeout_s,
        )
        return cast(SyncReport, answers[0])

    def save(self, directory: Path) -> None:
        self._run("save", lambda _rank, handle: handle.save.remote(self.role, directory))

    def load(self, directory: Path) -> None:
        self._run("load", lambda _rank, handle: handle.load.remote(self.role, directory))

    def export(self, directory: Path) -> None:
        self._run("export", lambda _rank, handle: handle.export.remote(self.role, directory))

    def prove_export(self, directory: Path) -> None:
        """Export into `directory` and compare what was written with the weights held, bit for bit: a run whose model
        cannot be saved must not learn first. Raises CheckpointError."""
        self.export(directory)
        self._run("trial of export", lambda _rank, handle: handle.check_export.remote(self.role, directory))

    def _run(self, phase: str, submit: Submit) -> list[object]:
        return self.group.run(submit, phase=f"{self.role} {phase}", timeout_s=self._step_timeout_s)

    def _split(self, batches: Sequence[Item]) -> list[Sequence[Item]]:
        """Rank r's share of batches in rank-major order."""
        if len(batches) % self.num_ranks:
            raise ValueError(f"{len(batches)} micro-batches do not split over {self.num_ranks} ranks.")
        share = len(batches) // self.num_ranks
        return [batches[rank * share : (rank + 1) * share] for rank in range(self.num_ranks)]


class EmaReferenceEngine(GroupEngine):
    """The reference that the policy's own processes hold, as a `EmaReferenceScorer`."""

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        parts = self._split(batches)
        answers = self._run(
            "forward_ema_reference", lambda rank, handle: handle.forward_ema_reference.remote(self.role, parts[rank])
        )
        return [array for part in answers for array in cast(list[FloatArray], part)]

    def update_ema(self) -> float:
        answers = self._run("follow", lambda _rank, handle: handle.update_ema.remote(self.role))
        return cast(float, answers[0])
