"""Learning from experiences: epochs over a rollout batch, mini-batch by mini-batch, all trained roles in parallel."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from rlhf.algorithms.base import Algorithm
from rlhf.config.run import TrainSection
from rlhf.engines.base import TrainEngine
from rlhf.orchestrator.run.schedule import RunLength
from rlhf.orchestrator.step.batching import (
    BatchPlan,
    MicroBatchLimits,
    build_batches,
    merge_rank_major,
    plan_batches,
    unpack_tokens,
    with_own_routes,
)
from rlhf.orchestrator.step.learn_result import LearnResult
from rlhf.orchestrator.step.rows import Rows
from rlhf.orchestrator.step.skipped_updates import Note, SkippedUpdates
from rlhf.orchestrator.step.step_scores import TakeOutputs
from rlhf.orchestrator.step.token_scores import StepPlan
from rlhf.orchestrator.step.waiting import gather, in_thread
from rlhf.types import Experience, Metrics, Role, ScoredGroup, TrainBatch

PTX = "ptx"


class Pretraining:
    """Text whose likelihood the policy also learns, with each of its mini-batches (Ouyang et al. 2022, ptx)."""

    def __init__(self, rows: Rows[ScoredGroup], algorithm: Algorithm, batch_size: int) -> None:
        """`algorithm` turns demonstrations into experiences (SFT does)."""
        self.rows = rows
        self._algorithm = algorithm
        self._batch_size = batch_size

    def take(self) -> list[Experience]:
        """The next rows as experiences."""
        examples = self._algorithm.select(self.rows.take(self._batch_size))
        return self._algorithm.credit(examples, [{}] * len(examples))[0]


class Learner:
    """Trains every trained role. The roles are separate processes, so each is called from a thread of its own."""

    def __init__(
        self,
        engines: Mapping[Role, TrainEngine],
        algorithm: Algorithm,
        train: TrainSection,
        length: RunLength,
        *,
        seed: int,
        note: Note,
        pretraining: Pretraining | None = None,
    ) -> None:
        self._engines = engines
        self._algorithm = algorithm
        self._train = train
        self._length = length
        self._seed = seed
        self._note = note
        self._pretraining = pretraining
        self.skipped_updates = SkippedUpdates(engines, note)

    def learn(
        self, step: int, experiences: Sequence[Experience], plan: StepPlan, take_first: TakeOutputs | None = None
    ) -> LearnResult:
        """All epochs of one step of the loop, until the algorithm stops them early. `take_first`, where there is only
        one pass, gets the policy's outputs before its weights change; they do not if it raises."""
        roles = [role for role in self._engines if self._length.learns(role, step)]
        total = LearnResult()
        for epoch in range(self._length.num_epochs if roles else 0):
            order = self._order(step, epoch, plan.num_minibatches)
            takes = {Role.POLICY: take_first}
            jobs = {
                role: in_thread(
                    self._run, role, step, experiences, [plan.by_role[role][k] for k in order], takes.get(role)
                )
                for role in roles
            }
            timeout_s = self._train.step_timeout_s * len(order)
            one_epoch = LearnResult()
            for learned in gather(jobs, phase=f"learn (step {step})", timeout_s=timeout_s).values():
                one_epoch.merge(learned)
            total.merge(one_epoch)
            if not self._algorithm.after_pass(one_epoch.metrics):
                break
        return total

    def _order(self, step: int, epoch: int, num_minibatches: int) -> list[int]:
        """The order of the mini-batches: as planned in the first epoch, shuffled anew in each later one."""
        if epoch == 0:
            return list(range(num_minibatches))
        order: list[int] = np.random.default_rng([self._seed, step, epoch]).permutation(num_minibatches).tolist()
        return order

    def _batches(
        self, role: Role, experiences: Sequence[Experience], part: BatchPlan, *, is_first_pass: bool
    ) -> list[TrainBatch]:
        """The micro-batches of one optimizer step."""
        batches = build_batches(part, experiences, str(role), is_first_pass=is_first_pass)
        if role is not Role.POLICY:
            return [replace(batch, tokens=with_own_routes(batch.tokens)) for batch in batches]
        if self._pretraining is not None:
            batches = self._with_pretraining(self._pretraining, batches, part.num_ranks)
        return batches

    def _with_pretraining(
        self, pretraining: Pretraining, batches: list[TrainBatch], num_ranks: int
    ) -> list[TrainBatch]:
        texts = pretraining.take()
        plan = plan_batches(texts, MicroBatchLimits.of(self._train, num_ranks))
        return merge_rank_major(num_ranks, [batches, build_batches(plan, texts, PTX, temperature=1.0)])

    def _run(
        self,
        role: Role,
        step: int,
        experiences: Sequence[Experience],
        minibatches: Sequence[BatchPlan],
        take_outputs: TakeOutputs | None,
    ) -> LearnResult:
        """One role's optimizer steps of one epoch. Each is built when its turn comes and kept no longer: those of a
        whole step would be one more copy of all its arrays."""
        engine, learned = self._engines[role], LearnResult()
        for part in minibatches:
            is_first_pass = take_outputs is not None
            passed = engine.forward_backward(self._batches(role, experiences, part, is_first_pass=is_first_pass))
            if take_outputs is not None:
                take_outputs(list(unpack_tokens(part, experiences, passed.outputs).values()))
            ids = [experiences[i].id for i in part.indices]
            report = engine.optim_step()
            if report.unmoved and report.grad_norm > 0:  # without a gradient nothing moves, which the metrics explain
                text = f"{role}: {len(report.unmoved)} of its parameters did not change in the first update"
                self._note("unmoved", f"{text} (events.jsonl names them)", parameters=list(report.unmoved))
            if self.skipped_updates.count(role, step, ids, report):
                learned.num_skipped += 1
                continue
            learned.num_updates += 1
            learned.add(passed.metrics, weight=len(ids))
            of_optimizer = {f"{role}/grad_norm": report.grad_norm, f"{role}/lr": report.lr}
            learned.add(Metrics(sums=of_optimizer), weight=1.0)
        return learned
