"""A policy whose first weight sync is proved: what the engines sample, the policy finds equally likely."""

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
"""Nats a token, by the engines' number format. Kernels round differently; stale weights differ by far more."""


class ProbedPolicy(GroupEngine):
    """The policy's `TrainEngine`. After the first sync to engines, and so after every resume, each of them answers a
    few prompts, and its own log-probs of what it sampled must be those of the policy.

    Equal digests say that the bytes arrived; only log-probs say that the engine computes with them.
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
        self._proved: tuple[Worker, ...] = ()

    def send_weights(self, version: int) -> SyncReport:
        """As `GroupEngine.send_weights`. Raises NumericsError where an engine computes with other weights."""
        self._pool(self._engines).require_alive()  # or the sync would miss one in its midst
        report = super().send_weights(version)
        if self._proved != self._engines.workers:
            for worker in self._engines.workers:
                self._prove(worker.name, self._pool(WorkerGroup([worker])).generate(self._requests), version)
            self._proved = self._engines.workers
        return report

    def _prove(self, name: str, rollouts: Sequence[Rollout], version: int) -> None:
        prompts = [request.prompt_token_ids for request in self._requests]
        sequences = [np.concatenate([p, rollout.token_ids]) for p, rollout in zip(prompts, rollouts, strict=True)]
        packed = PackedTokens(
            token_ids=np.concatenate(sequences),
            lengths=np.array([len(sequence) for sequence in sequences], dtype=np.int64),
        )
        # Every rank runs the same batch: ranks always run equally many, and one answer is enough.
        said = self.forward([packed] * self.num_ranks)[0]
        by_policy = np.concatenate(
            [part[len(p) :] for part, p in zip(np.split(said, np.cumsum(packed.lengths)[:-1]), prompts, strict=True)]
        )
        by_engine = np.concatenate([rollout.log_probs for rollout in rollouts])
        gap = float(np.abs(by_policy - by_engine).max())
        if not gap <= self._tolerance:  # NaN is beyond every tolerance
            raise NumericsError(
                f"{name}: version {version}: its log-probs of what it sampled are {gap:.3g} nats off the policy's "
                f"(at most {self._tolerance:g}): the weights arrived, but it does not compute with them."
            )
