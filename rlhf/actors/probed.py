"""A policy that checks its first weight sync by comparing the log-probs of engines and policy."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import numpy as np

from rlhf.actors.calls import Worker
from rlhf.actors.groups import GroupEngine, WorkerGroup
from rlhf.actors.rollout import RolloutPool
from rlhf.engines.base import generate
from rlhf.engines.weight_sync.probe import PolicyProbe, require_agreement
from rlhf.types import PackedTokens, Role, Rollout, RolloutRequest, SyncReport

OpenPool = Callable[[WorkerGroup], RolloutPool]
"""Makes a pool of some rollout engines."""


class ProbedPolicy(GroupEngine):
    """The policy's `TrainEngine`. After the first weight sync to new engines, each engine samples short responses, and
    its log-probs of them must be equal to those of the policy (`require_agreement`)."""

    def __init__(
        self,
        group: WorkerGroup,
        *,
        engines: WorkerGroup,
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
        self._probed: tuple[Worker, ...] = ()

    def send_weights(self, version: int) -> SyncReport:
        """As `GroupEngine.send_weights`. Raises NumericsError if an engine or the policy
        computes something else than the policy's weights say."""
        self._pool(self._engines).require_alive()  # replaces lost engines before the sync starts
        report = self._send_weights(version, self._engines.workers)
        if self._probed != self._engines.workers:
            for worker in self._engines.workers:
                rollouts = generate(self._pool(self._engines.subset([worker])), self._requests)
                self._probe(worker.name, rollouts, version)
            self._probed = self._engines.workers
        return report

    def _probe(self, name: str, rollouts: Sequence[Rollout], version: int) -> None:
        prompts = [request.prompt_token_ids for request in self._requests]
        sequences = [np.concatenate([p, rollout.token_ids]) for p, rollout in zip(prompts, rollouts, strict=True)]
        packed = PackedTokens(
            token_ids=np.concatenate(sequences),
            lengths=np.array([len(sequence) for sequence in sequences], dtype=np.int64),
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
