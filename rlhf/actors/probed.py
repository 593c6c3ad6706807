"""A policy that checks its first weight sync by comparing the log-probs of engines and policy."""

from collections.abc import Callable, Sequence

import numpy as np

from rlhf.actors.calls import Worker
from rlhf.actors.groups import GroupEngine, WorkerGroup
from rlhf.actors.rollout import RolloutPool
from rlhf.errors import NumericsError
from rlhf.types import PackedTokens, Role, Rollout, RolloutRequest, SyncReport

OpenPool = Callable[[WorkerGroup], RolloutPool]
"""Makes a pool of some rollout engines."""
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.5}
"""Nats per token, by the engines' dtype. Kernels round differently; stale weights differ by far more."""


class ProbedPolicy(GroupEngine):
    """The policy's `TrainEngine`. After the first weight sync to new engines, each engine samples short responses, and
    its log-probs of them must be equal to those of the policy.

    Equal digests show that the bytes arrived; only log-probs show that the engine computes with them.
    """

    def __init__(
        self,
        group: WorkerGroup,
        *,
        engines: WorkerGroup,
        pool: OpenPool,
        requests: Sequence[RolloutRequest],
        tolerance: float,
        step_timeout_s: float,
        sync_timeout_s: float,
    ) -> None:
        super().__init__(group, Role.POLICY, step_timeout_s=step_timeout_s, sync_timeout_s=sync_timeout_s)
        self._engines = engines
        self._pool = pool
        self._requests = requests
        self._tolerance = tolerance
        self._probed: tuple[Worker, ...] = ()

    def send_weights(self, version: int) -> SyncReport:
        """As `GroupEngine.send_weights`. Raises NumericsError if an engine computes with other weights."""
        self._pool(self._engines).require_alive()  # replaces lost engines before the sync starts
        report = super().send_weights(version)
        if self._probed != self._engines.workers:
            for worker in self._engines.workers:
                self._probe(worker.name, self._pool(self._engines.subset([worker])).generate(self._requests), version)
            self._probed = self._engines.workers
        return report

    def _probe(self, name: str, rollouts: Sequence[Rollout], version: int) -> None:
        prompts = [request.prompt_token_ids for request in self._requests]
        sequences = [np.concatenate([p, rollout.token_ids]) for p, rollout in zip(prompts, rollouts, strict=True)]
        packed = PackedTokens(
            token_ids=np.concatenate(sequences),
            lengths=np.array([len(sequence) for sequence in sequences], dtype=np.int64),
        )
        # Every rank runs the same batch, since ranks always run equally many. One result is enough.
        log_probs = self.forward([packed] * self.num_ranks)[0]
        by_policy = np.concatenate(
            [
                part[len(p) :]
                for part, p in zip(np.split(log_probs, np.cumsum(packed.lengths)[:-1]), prompts, strict=True)
            ]
        )
        by_engine = np.concatenate([rollout.log_probs for rollout in rollouts])
        difference = float(np.abs(by_policy - by_engine).max())
        if not difference <= self._tolerance:  # also for NaN
            raise NumericsError(
                f"{name}: version {version}: its log-probs of its own samples differ from the policy's by "
                f"{difference:.3g} nats (at most {self._tolerance:g}): the weights arrived, but "
                "it does not compute with them."
            )
