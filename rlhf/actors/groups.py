"""Groups of workers that act as one engine: a batch is split over the ranks, and the results are joined again."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, cast

import ray
from ray.exceptions import RayError

from rlhf.actors.calls import Call, Worker, first_line
from rlhf.actors.waiting import RemoteCalls
from rlhf.engines.base import PassReport
from rlhf.errors import INFRASTRUCTURE, RlhfError, WorkerLostError
from rlhf.types import FloatArray, PackedTokens, Role, StepReport, SyncReport, TrainBatch

Item = TypeVar("Item")
Submit = Callable[[int, "ray.actor.ActorHandle"], "ray.ObjectRef[object]"]
Replace = Callable[[Sequence[Worker], RlhfError], Sequence[Worker]]
"""Takes lost workers and the error that reported the loss. Returns new workers."""


class WorkerGroup:
    """The workers of one device group, in rank order.

    Every rank must run the same calls in the same order, or its collectives would wait for other ranks forever. Several
    threads of the driver call a group, so a lock makes sure that a call reaches all ranks before the next call does.
    """

    def __init__(self, workers: Sequence[Worker], calls: RemoteCalls) -> None:
        self.workers = tuple(workers)
        self._calls = calls
        self._submitting = threading.Lock()

    def run(self, submit: Submit, *, phase: str, timeout_s: float, peers: Sequence[Worker] = ()) -> list[object]:
        """Call every rank through `submit(rank, handle)` and return the results, in rank order. `peers` are workers of
        other groups that these calls wait for.

        Raises: as `RemoteCalls.run`.
        """
        return self._run(self.workers, submit, phase, timeout_s, peers)

    def wait(self, calls: Sequence[Call], *, phase: str, timeout_s: float) -> list[object]:
        """The results of calls of some workers, in order. Raises: as `RemoteCalls.run`."""
        return self._calls.wait_all(calls, phase=phase, timeout_s=timeout_s)

    def tell_seconds(self, phase: str, seconds: Sequence[tuple[Worker, float]]) -> None:
        """Report how long each worker took for its part of some work that has no wait of its own."""
        self._calls.tell_seconds(phase, seconds)

    def start_again(self, lost: Worker, error: RlhfError) -> Worker:
        """A new worker in the place of one that `error` reported as lost. Raises `error` where there can be none."""
        raise error

    def subset(self, workers: Sequence[Worker]) -> "WorkerGroup":
        """Some of the workers as a group that does not replace lost ones."""
        return WorkerGroup(workers, self._calls)

    def _run(
        self, workers: Sequence[Worker], submit: Submit, phase: str, timeout_s: float, peers: Sequence[Worker]
    ) -> list[object]:
        def submit_all() -> list[Call]:
            with self._submitting:
                try:
                    return [Call(worker=worker, ref=submit(rank, worker.handle)) for rank, worker in enumerate(workers)]
                except RayError as error:  # the arguments do not fit into the object store, or a worker is dead
                    raise WorkerLostError(f"{phase}: could not be called: {first_line(error)}") from error

        return self._calls.run(submit_all, phase=phase, timeout_s=timeout_s, peers=peers)


class ReplaceableGroup(WorkerGroup):
    """Workers without state of the run: everything in them can be loaded or sent again. When one of them is lost,
    new workers replace all of them and repeat the call, with the same results.

    A call is repeated once: when the new workers are lost too, the error is raised.
    """

    def __init__(self, workers: Sequence[Worker], calls: RemoteCalls, replace: Replace) -> None:
        super().__init__(workers, calls)
        self._replace = replace
        self._replacing = threading.Lock()

    def run(self, submit: Submit, *, phase: str, timeout_s: float, peers: Sequence[Worker] = ()) -> list[object]:
        """As `WorkerGroup.run`. Raises: as `RemoteCalls.run` for the new workers, or why these could not start."""
        called = self.workers
        try:
            return self._run(called, submit, phase, timeout_s, peers)
        except INFRASTRUCTURE as error:
            self._replace_all(called, error)
        return self._run(self.workers, submit, phase, timeout_s, peers)

    def _replace_all(self, lost: Sequence[Worker], error: RlhfError) -> None:
        with self._replacing:
            if self.workers is lost:  # else another thread has replaced them already
                self.workers = tuple(self._new_workers(lost, error))

    def _new_workers(self, lost: Sequence[Worker], error: RlhfError) -> Sequence[Worker]:
        try:
            return self._replace(lost, error)
        except INFRASTRUCTURE as worse:
            raise type(worse)(f"{error} They could not be replaced: {worse}") from error


class GroupEngine:
    """One role of a worker group as a `TrainEngine`: the policy, critic, reference or reward model of the loop."""

    def __init__(
        self,
        group: WorkerGroup,
        role: Role,
        *,
        step_timeout_s: float,
        sync_timeout_s: float,
        sequence_parallel_size: int = 1,
    ) -> None:
        """`sequence_parallel_size` consecutive ranks compute each micro-batch together: to the loop they are one."""
        self.group = group
        self.role = role
        self.num_ranks = len(group.workers) // sequence_parallel_size
        self._size = sequence_parallel_size
        self._step_timeout_s = step_timeout_s
        self._sync_timeout_s = sync_timeout_s

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        parts = self._split(batches)
        results = self._run("forward", lambda rank, handle: handle.forward.remote(self.role, parts[rank]))
        return self._joined(results)

    def forward_backward(self, batches: Sequence[TrainBatch]) -> PassReport:
        parts = self._split(batches)
        results = self._run(
            "forward_backward", lambda rank, handle: handle.forward_backward.remote(self.role, parts[rank])
        )
        return sum(cast(list[PassReport], results), PassReport())

    def optim_step(self) -> StepReport:
        results = self._run("optim_step", lambda _rank, handle: handle.optim_step.remote(self.role))
        return cast(StepReport, results[0])

    def send_weights(self, version: int) -> SyncReport:
        return self._send_weights(version, ())

    def save(self, directory: Path) -> None:
        self._run("save", lambda _rank, handle: handle.save.remote(self.role, directory))

    def load(self, directory: Path) -> None:
        self._run("load", lambda _rank, handle: handle.load.remote(self.role, directory))

    def export(self, directory: Path) -> None:
        self._run("export", lambda _rank, handle: handle.export.remote(self.role, directory))

    def verify_export(self, directory: Path) -> None:
        """Export into `directory`, load that, and compare it with the weights in memory, bit for bit. Raises ModelError
        if they differ, CheckpointError if the disk refuses."""
        self.export(directory)
        self._run("trial of export", lambda _rank, handle: handle.check_export.remote(self.role, directory))

    def _send_weights(self, version: int, engines: Sequence[Worker]) -> SyncReport:
        results = self.group.run(
            lambda _rank, handle: handle.send_weights.remote(self.role, version),
            phase=f"weight sync of version {version}",
            timeout_s=self._sync_timeout_s,
            peers=engines,
        )
        return cast(SyncReport, results[0])

    def _run(self, phase: str, submit: Submit) -> list[object]:
        return self.group.run(submit, phase=f"{self.role} {phase}", timeout_s=self._step_timeout_s)

    def _joined(self, results: Sequence[object]) -> list[FloatArray]:
        """The outputs of all batches, in their order. Ranks that compute together have the same."""
        return [array for part in results[:: self._size] for array in cast(list[FloatArray], part)]

    def _split(self, batches: Sequence[Item]) -> list[Sequence[Item]]:
        """The batches of each rank: contiguous parts of equal length, the same for ranks that compute together."""
        if len(batches) % self.num_ranks:
            raise ValueError(f"{len(batches)} micro-batches do not split over {self.num_ranks} ranks.")
        share = len(batches) // self.num_ranks
        parts = [batches[start : start + share] for start in range(0, len(batches), share)]
        return [part for part in parts for _ in range(self._size)]


class EmaReferenceEngine(GroupEngine):
    """The EMA reference: a copy of the policy in the policy's own workers (an `EmaReferenceScorer`)."""

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        parts = self._split(batches)
        results = self._run(
            "forward_ema_reference", lambda rank, handle: handle.forward_ema_reference.remote(self.role, parts[rank])
        )
        return self._joined(results)

    def update_ema(self) -> float:
        results = self._run("update_ema", lambda _rank, handle: handle.update_ema.remote(self.role))
        return cast(float, results[0])
