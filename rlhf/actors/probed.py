"""A policy that sends its weights to rollout engines, and checks how engines compute with the first that they get."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np

from rlhf.actors.calls import Worker
from rlhf.actors.engine_group import EngineGroup
from rlhf.actors.groups import GroupEngine, Submit, WorkerGroup
from rlhf.actors.rollout import RolloutPool
from rlhf.engines.base import PassReport, generate
from rlhf.engines.weight_sync.probe import PolicyProbe, require_agreement
from rlhf.errors import WorkerLostError
from rlhf.types import PackedTokens, Role, Rollout, RolloutRequest, SyncReport, TrainBatch

OpenPool = Callable[[WorkerGroup], RolloutPool]
"""Makes a pool of some rollout engines."""


class ProbedPolicy(GroupEngine):
    """The policy's `TrainEngine`. After the first weight sync to new engines, each engine samples short responses, and
    its log-probs of them must be equal to those of the policy (`require_agreement`).

    An engine that takes the place of a lost one (`introduce`) gets the weights of the live version: at once while the
    policy has these, that is until it begins to learn; else with the next sync, since weights in the middle of a step
    are no version. Thread-safe: one call of the policy at a time.
    """

    def __init__(
        self,
        group: WorkerGroup,
        *,
        engines: EngineGroup,
        pool: OpenPool,
        requests: Sequence[RolloutRequest],
        step_timeout_s: float,
        sync_timeout_s: float,
        sequence_parallel_size: int = 1,
    ) -> None:
        super().__init__(
            group,
            Role.POLICY,
            step_timeout_s=step_timeout_s,
            sync_timeout_s=sync_timeout_s,
            sequence_parallel_size=sequence_parallel_size,
        )
        self._engines = engines
        self._pool = pool
        self._requests = requests
        self._calling = threading.Lock()
        self._version: int | None = None
        """The live version; None while the policy has other weights."""
        self._probed: set[Worker] = set()
        self._introduced: dict[Worker, Future[None]] = {}
        """Engines that wait for the next sync."""

    def forward_backward(self, batches: Sequence[TrainBatch]) -> PassReport:
        self._leave_version()
        return super().forward_backward(batches)

    def load(self, directory: Path) -> None:
        self._leave_version()
        super().load(directory)

    def send_weights(self, version: int) -> SyncReport:
        """As `GroupEngine.send_weights`. Raises NumericsError if an engine or the policy
        computes something else than the policy's weights say."""
        with self._calling:
            workers = self._engines.some_alive(self._sync_timeout_s)
            report = self._send(version, workers)
            self._version = version
            introduced, self._introduced = self._introduced, {}
        for worker, future in introduced.items():
            if worker in workers:
                future.set_result(None)
            else:
                future.set_exception(WorkerLostError(f"weight sync of version {version}: {worker} was lost before it"))
        return report

    def introduce(self, worker: Worker) -> "Future[None]":
        """Have a new engine serve the live version. The future ends when it does, or with WorkerLostError if it was
        lost before. Raises: as `send_weights`."""
        future: Future[None] = Future()
        with self._calling:
            if self._version is None:
                self._introduced[worker] = future
                return future
            if worker not in self._probed:
                self._send(self._version, [worker])
        future.set_result(None)
        return future

    def _run(self, phase: str, submit: Submit) -> list[object]:
        with self._calling:
            return super()._run(phase, submit)

    def _leave_version(self) -> None:
        with self._calling:
            self._version = None

    def _send(self, version: int, workers: Sequence[Worker]) -> SyncReport:
        """Send the weights to engines, and probe those that never had any."""
        self._engines.connect(workers)
        report = self._send_weights(version, workers)
        for worker in workers:
            if worker not in self._probed:
                rollouts = generate(self._pool(self._engines.subset([worker])), self._requests)
                self._probe(worker.name, rollouts, version)
                self._probed.add(worker)
        return report

    def _probe(self, name: str, rollouts: Sequence[Rollout], version: int) -> None:
        prompts = [request.prompt_token_ids for request in self._requests]
        sequences = [np.concatenate([p, rollout.token_ids]) for p, rollout in zip(prompts, rollouts, strict=True)]
        experts = [rollout.routed_experts for rollout in rollouts if rollout.routed_experts is not None]
        packed = PackedTokens(
            token_ids=np.concatenate(sequences),
            lengths=np.array([len(sequence) for sequence in sequences], dtype=np.int64),
            routed_experts=np.concatenate(experts) if experts else None,
        )
        replies = self.group.run(
            lambda _rank, handle: handle.probe.remote(self.role, packed),
            phase="log-prob probe of the policy",
            timeout_s=self._sync_timeout_s,
        )
        reply = cast(PolicyProbe, replies[0])  # every rank runs the same batch, since ranks always run equally many
        starts = np.cumsum(packed.lengths) - packed.lengths
        sampled = np.concatenate(
            [
                np.arange(start + len(prompt), start + length)
                for start, length, prompt in zip(starts, packed.lengths, prompts, strict=True)
            ]
        )
        require_agreement(
            name,
            version,
            np.concatenate([rollout.log_probs for rollout in rollouts]),
            replace(reply, log_probs=reply.log_probs[sampled], alone=reply.alone[sampled]),
        )
