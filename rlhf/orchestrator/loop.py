"""The loop.

take -> score tokens -> credit -> batch -> learn -> sync weights -> release slots -> (evaluate, checkpoint)

Every algorithm runs in it. What differs is data: which models `algorithm.needs`, where groups come from, and how many
mini-batches and epochs a step has.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from rlhf.algorithms.base import Algorithm
from rlhf.config.run import CheckpointSection, EvalSection, TrainSection
from rlhf.errors import CheckpointError, NumericsError, PreemptedError, RewardError, RlhfError, WeightSyncError
from rlhf.orchestrator.evaluation import Evaluator
from rlhf.orchestrator.run.checkpoint import Checkpoints, RunState
from rlhf.orchestrator.run.preemption import StopAskedError, StopRequest
from rlhf.orchestrator.run.records import Records
from rlhf.orchestrator.run.resume import ResumePoint
from rlhf.orchestrator.run.run_directory import Status
from rlhf.orchestrator.run.schedule import RunLength
from rlhf.orchestrator.step.learning import Learned, Learner, Pretraining
from rlhf.orchestrator.step.metrics import PhaseClock, describe_time, describe_trained, flatten, merge
from rlhf.orchestrator.step.mismatch import MismatchWatch, log_prob_mismatch, mismatch_metrics
from rlhf.orchestrator.step.sources import GroupBatch, GroupSource
from rlhf.orchestrator.step.token_scores import Models, plan_learning, plan_step, score_tokens
from rlhf.types import Example, Head, Role

KINDS = {
    Head.SCORES: "AutoModelForSequenceClassification",
    Head.TOKEN_SCORES: "AutoModelForTokenClassification",
}
"""What loads an exported model that is no language model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSections:
    """The sections of the config that the loop reads."""

    train: TrainSection
    eval: EvalSection
    checkpoint: CheckpointSection
    max_lag: int = 0
    """`rollout.max_lag`; 0 in a run that samples nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a run is made of. `evaluator` and `pretraining` are there where the run has them."""

    algorithm: Algorithm
    models: Models
    source: GroupSource
    evaluator: Evaluator | None = None
    pretraining: Pretraining | None = None
    gauge: Callable[[], Mapping[str, float]] = dict[str, float]
    """Figures of the processes, read once a step."""


class Loop:
    """One run, from its first step or from a checkpoint to an exported model."""

    def __init__(
        self,
        parts: Parts,
        sections: LoopSections,
        length: RunLength,
        *,
        records: Records,
        checkpoints: Checkpoints,
        stop: StopRequest,
        fresh: RunState,
    ) -> None:
        """`fresh` is the state of the run before its first step: seed, config, ranks and data fingerprint."""
        self._parts = parts
        self._algorithm = parts.algorithm
        self._engines = parts.models.trained
        self._source = parts.source
        self._train = sections.train
        self._eval = sections.eval
        self._checkpoint_section = sections.checkpoint
        self._max_lag = sections.max_lag
        self._num_steps = length.num_steps
        self._seed = fresh.seed
        self._records = records
        self._checkpoints = checkpoints
        self._stop = stop
        self._state = replace(fresh, algorithm=parts.algorithm.state())
        self._saved_step = -1
        self._gap_watch = MismatchWatch(sections.train, records.warn)
        self._clock = PhaseClock()
        self._online = parts.algorithm.needs.online
        self._learner = Learner(
            self._engines,
            parts.algorithm,
            sections.train,
            length,
            seed=fresh.seed,
            note=records.note,
            pretraining=parts.pretraining,
        )

    def run(self, resume_from: ResumePoint | None = None) -> Path:
        """Train to the last step and export. Returns the model's folder; raises PreemptedError where asked to stop."""
        try:
            with self._stop.listening(), self._stop.safe_points():
                return self._run(resume_from)
        finally:
            self._source.close()

    def _run(self, resume_from: ResumePoint | None) -> Path:
        if resume_from is None:
            self._save()  # a trial: a run that cannot be saved must not learn first
        else:
            self._restore(resume_from)
        first = self._state.step + 1
        self._records.status(Status.RUNNING, self._state.step)
        try:
            self._sync(self._state.step)
            self._clock = PhaseClock()
            self._source.start(first, self._num_steps, self._state.position)
            for step in range(first, self._num_steps + 1):
                self._stop.check()
                self._step(step)
        except StopAskedError:
            self._save()
            raise PreemptedError(f"asked to stop: step {self._state.step} is saved; continue with --resume") from None
        except RewardError as error:
            self._save()
            raise RewardError(
                f"{str(error).rstrip('.')}. Step {self._state.step} is saved; continue with --resume"
            ) from error
        try:
            return self._finish()
        except OSError as error:
            if isinstance(error, RlhfError):
                raise
            why = error.strerror or error
            text = f"the model cannot be written: {why}. Every step is saved; make room, then --resume"
            raise CheckpointError(text) from error

    def _step(self, step: int) -> None:
        clock = self._clock
        with clock.phase("wait"):
            batch = self._source.take(step)
        self._require_lag(step, batch)
        examples = self._algorithm.select(batch.groups)
        learned, figures = self._learn(step, examples, clock)
        with clock.phase("sync"):
            sync = self._sync(step)
        self._source.release()
        followed = self._update_ema(step, clock)
        self._state = self._state_after(step, batch, learned)
        evaluated = self._evaluate(step, clock)
        metrics = merge(
            batch.metrics,
            describe_trained(batch.groups, step - 1),
            sync,
            followed,
            evaluated,
            self._parts.gauge(),
            describe_time(clock, batch, sum(len(sequence) for example in examples for sequence in example.sequences)),
            {
                "data/position": float(batch.position),
                "data/examples": float(len(examples)),
                "updates/applied": float(learned.num_updates),
                "updates/skipped": float(learned.num_skipped),
            },
            figures,
            flatten(learned.metrics),
        )
        self._clock = PhaseClock()
        with self._clock.phase("record"):
            self._records.step(step, dict(metrics), batch.groups, online=self._online)
        with self._clock.phase("checkpoint"):
            self._checkpoint(step)

    def _learn(self, step: int, examples: Sequence[Example], clock: PhaseClock) -> tuple[Learned, dict[str, float]]:
        """Measure, credit and learn. Until learning begins the weights are those of the last step: a safe point."""
        if not examples:
            self._records.warn(f"step {step}: the algorithm selected nothing to learn from")
            return Learned(), {}
        with clock.phase("log_probs"):
            plan = plan_step(step, examples, self._parts.models, self._train, self._seed)
            signals = score_tokens(self._algorithm.needs.measures, examples, plan, self._parts.models, self._train)
            gap = mismatch_metrics(log_prob_mismatch(examples, signals), self._train.mismatch_band)
            self._gap_watch.see(step, gap)
        self._stop.check()
        with clock.phase("credit"):
            experiences, credited = self._algorithm.credit(examples, signals)
        for text in credited.warnings:
            self._records.warn(f"step {step}: {text}")
        with clock.phase("learn"):
            learning = plan_learning(plan, experiences, self._parts.models, self._train)
            learned = self._learner.learn(step, experiences, learning)
        return learned, {**gap, **flatten(credited)}

    def _update_ema(self, step: int, clock: PhaseClock) -> dict[str, float]:
        """Let a reference that follows the policy come nearer, when it is due."""
        how, copy = self._algorithm.needs.ema_reference, self._parts.models.ema_reference
        if how is None or copy is None or step % how.every_steps:
            return {}
        with clock.phase("ema_reference"):
            moved = copy.update_ema()
        if not moved and how.decay < 1.0:
            self._records.warn(f"step {step}: the reference follows the policy, and did not move")
        return {"reference/moved": moved, "reference/version": float(step)}

    def _sync(self, version: int) -> dict[str, float]:
        """Make the policy's weights live in the rollout engines as `version`."""
        if not self._online:
            return {}
        report = self._engines[Role.POLICY].send_weights(version)
        if report.version != version:
            raise WeightSyncError(f"sync: version {version} was sent, {report.version} is live")
        return {"sync/seconds": report.seconds, "sync/bytes": float(report.num_bytes)}

    def _require_lag(self, step: int, batch: GroupBatch) -> None:
        """No rollout may be older than max_lag versions."""
        for rollout in (*chain.from_iterable(group.rollouts for group in batch.groups), *batch.baselines):
            lag = step - 1 - rollout.weight_version
            if self._online and not 0 <= lag <= self._max_lag:
                raise RlhfError(
                    f"step {step}: {rollout.id} was sampled from weights of version {rollout.weight_version}, the "
                    f"policy is at {step - 1}; at most {self._max_lag} versions of lag are allowed"
                )

    def _state_after(self, step: int, batch: GroupBatch, learned: Learned) -> RunState:
        pretraining = self._parts.pretraining
        return replace(
            self._state,
            step=step,
            position=batch.position,
            pretraining_position=pretraining.rows.position if pretraining else 0,
            num_updates=self._state.num_updates + learned.num_updates,
            algorithm=self._algorithm.state(),
        )

    def _evaluate(self, step: int, clock: PhaseClock) -> dict[str, float]:
        """Figures on held-out rows, by the weights that are about to be saved."""
        every = self._eval.every_steps
        due = step == self._num_steps or (every and step % every == 0)
        if self._parts.evaluator is None or not due:
            return {}
        with clock.phase("evaluate"):
            try:
                return self._parts.evaluator.evaluate(step)
            except RewardError as error:
                self._records.warn(f"evaluation at step {step} failed: {error}")
                return {}

    def _checkpoint(self, step: int) -> None:
        if step == self._num_steps:
            self._save()
        elif step % self._checkpoint_section.every_steps == 0 and self._checkpoints.try_save(
            self._state, self._engines
        ):
            self._saved_step = step

    def _save(self) -> None:
        """Save the last finished step, unless it is saved already."""
        if self._saved_step != self._state.step:
            self._checkpoints.save(self._state, self._engines)
            self._saved_step = self._state.step

    def _restore(self, point: ResumePoint) -> None:
        for role, engine in self._engines.items():
            engine.load(point.path / role)
        # What the user may change (config, accepted data) is this run's; what the run remembers is the checkpoint's.
        self._state = replace(
            point.state,
            config=self._state.config,
            ranks=self._state.ranks,
            data_fingerprint=self._state.data_fingerprint,
        )
        self._algorithm.restore(point.state.algorithm)
        if self._parts.pretraining is not None:
            self._parts.pretraining.rows.position = point.state.pretraining_position
        self._saved_step = point.state.step
        self._records.directory.rewind(point.state.step)
        self._records.note("resume", f"continuing after step {point.state.step} from {point.path}")

    def _finish(self) -> Path:
        """Export the first trained role's model, and say how to load it."""
        if not self._state.num_updates:
            raise NumericsError(
                f"{self._state.step} steps made no update: nothing was learned. See the warnings in events.jsonl"
            )
        role, head = next(iter(self._algorithm.needs.trains.items()))
        final = self._records.directory.model
        temporary = final.with_name("model.tmp")
        for folder in (temporary, final):
            if folder.exists():
                shutil.rmtree(folder)
        temporary.mkdir()
        self._engines[role].export(temporary)
        temporary.rename(final)
        self._records.status(Status.DONE, self._state.step)
        kind = KINDS.get(head, "AutoModelForCausalLM")
        self._records.say(f"done: {self._state.step} steps, {self._state.num_updates} updates")
        self._records.say(f"model: {final}")
        self._records.say(f'load it: transformers.{kind}.from_pretrained("{final}")')
        return final
