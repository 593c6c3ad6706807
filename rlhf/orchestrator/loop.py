"""The training loop: the same for every algorithm.

wait for groups -> select examples -> compute log-probs and values -> credit -> learn -> describe -> sync weights
    -> release slots -> (evaluate, save a checkpoint)

Where engines and models take turns on the same devices, slots are released after the evaluation.

What differs between algorithms is data: which models `algorithm.needs`, where groups come from, and how many
mini-batches and epochs a step has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.algorithms.base import Algorithm
from rlhf.algorithms.response_metrics import response_metrics
from rlhf.config.run import CheckpointSection, EvalSection, TrainSection
from rlhf.errors import NumericsError, PreemptedError, RewardError
from rlhf.orchestrator.evaluation import Evaluation, Evaluator
from rlhf.orchestrator.run.causes import CauseWatch
from rlhf.orchestrator.run.checkpoint import Checkpoints, RunState
from rlhf.orchestrator.run.export import export_model, show_model
from rlhf.orchestrator.run.garbage import collecting_between_steps
from rlhf.orchestrator.run.preemption import StopRequest, StopRequestedError
from rlhf.orchestrator.run.progress import RunProgress
from rlhf.orchestrator.run.records import Records
from rlhf.orchestrator.run.responses import StepResponses, mean_advantages
from rlhf.orchestrator.run.resume import ResumePoint
from rlhf.orchestrator.run.run_directory import Status
from rlhf.orchestrator.run.schedule import RunLength
from rlhf.orchestrator.step.learn_result import LearnResult
from rlhf.orchestrator.step.learning import Learner, Pretraining
from rlhf.orchestrator.step.metrics import (
    GpuBudget,
    PhaseClock,
    flatten,
    lag_metrics,
    merge,
    row_metrics,
    throughput_metrics,
    time_metrics,
)
from rlhf.orchestrator.step.mismatch import MismatchWatch
from rlhf.orchestrator.step.policy_weights import PolicyWeights, require_lag
from rlhf.orchestrator.step.sources import GroupBatch, GroupSource
from rlhf.orchestrator.step.step_scores import StepScorer
from rlhf.orchestrator.step.token_scores import Models, plan_learning, plan_step
from rlhf.types import Example


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
    """What the loop drives. `evaluator`, `pretraining` and `gpus` are None in a run without them."""

    algorithm: Algorithm
    models: Models
    source: GroupSource
    evaluator: Evaluator | None = None
    pretraining: Pretraining | None = None
    gauge: Callable[[], Mapping[str, float]] = dict[str, float]
    """Gives the metrics of the worker processes, once a step."""
    gpus: GpuBudget | None = None
    takes_turns: bool = False
    """Whether engines and models compute in turn, on the same devices: then the next rollouts must wait for an
    evaluation, whose reward model would compute beside engines that are awake."""
    close: Callable[[], None] = lambda: None
    """Ends what the parts started besides the source."""


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
        self._sections = sections
        self._num_steps = length.num_steps
        self._seed = fresh.seed
        self._records = records
        self._stop = stop
        self._progress = RunProgress(
            fresh,
            parts.algorithm,
            self._engines,
            checkpoints,
            pretraining_rows=None if parts.pretraining is None else parts.pretraining.rows,
            every_steps=sections.checkpoint.every_steps,
            num_steps=length.num_steps,
        )
        self._weights = PolicyWeights(parts.algorithm.needs, parts.models, records.warn)
        watch = MismatchWatch(sections.train, records.warn)
        self._scorer = StepScorer(parts.algorithm.needs, parts.models, sections.train, length, watch)
        self._causes = CauseWatch(fresh.config, records.note)
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
        """Train to the last step and export the model. Returns its folder.

        Raises:
            PreemptedError: the run was asked to stop. The last finished step is saved.
            RewardError: rewards cannot be had. The last finished step is saved.
        """
        try:
            with self._stop.listening(), self._stop.safe_points():
                if resume_from is None:
                    self._progress.save()  # a run that cannot be saved must not learn first
                else:
                    self._resume(resume_from)
                self._train()
                return self._export()
        finally:
            self._source.close()
            self._parts.close()

    def _train(self) -> None:
        """Every step that is left, with the last one saved however training ends."""
        state = self._progress.state
        first = state.step + 1
        self._records.status(Status.RUNNING, state.step)
        try:
            self._weights.sync(state.step)
            self._clock = PhaseClock()
            self._source.start(first, self._num_steps, state.position, state.ahead)
            with collecting_between_steps() as collect:
                for step in range(first, self._num_steps + 1):
                    self._stop.check()
                    self._step(step)
                    collect()
        except StopRequestedError:
            self._progress.save()
            done = self._progress.state.step
            raise PreemptedError(f"asked to stop: step {done} is saved; continue with --resume") from None
        except RewardError as error:
            self._progress.save()
            done = self._progress.state.step
            raise RewardError(f"{str(error).rstrip('.')}. Step {done} is saved; continue with --resume") from error

    def _step(self, step: int) -> None:
        with self._clock.phase("wait"):
            batch = self._source.take(step)
        if self._online:
            require_lag(step, batch, self._sections.max_lag)
        examples = self._algorithm.select(batch.groups)
        learned, metrics, advantages = self._learn(step, examples)
        with self._clock.phase("sync"):
            metrics["weight sync"] = self._weights.sync(step)
        if not self._parts.takes_turns:
            self._source.release()
        if self._weights.is_ema_due(step):
            with self._clock.phase("ema_reference"):
                metrics["reference"] = self._weights.update_ema_reference(step)
        self._progress.advance(
            step,
            position=batch.position,
            ahead=batch.ahead,
            num_updates=learned.num_updates,
            recent_updates=self._learner.skipped_updates.state(),
        )
        evaluation = self._evaluate(step)
        if self._parts.takes_turns:
            self._source.release()
        metrics["evaluation"] = evaluation.metrics
        merged = merge({**metrics, **self._describe(step, batch, examples, learned)})
        self._clock = PhaseClock()
        with self._clock.phase("record"):
            trained = batch.groups if self._online else ()
            responses = StepResponses(trained=trained, advantages=advantages, evaluated=evaluation.responses)
            self._records.step(step, dict(merged), responses)
            self._causes.observe(step, merged)
        with self._clock.phase("checkpoint"):
            self._progress.save_if_due()

    def _learn(
        self, step: int, examples: Sequence[Example]
    ) -> tuple[LearnResult, dict[str, Mapping[str, float]], dict[str, float]]:
        """Compute log-probs and values, credit, and learn. Returns what was learned, metrics by their producer, and the
        mean advantage of each response.

        Until learning begins the weights are those of the last step: the run may stop there.
        """
        if not examples:
            self._records.warn(f"step {step}: the algorithm selected nothing to learn from")
            return LearnResult(), {}, {}
        models, train = self._parts.models, self._sections.train
        with self._clock.phase("log_probs"):
            plan = plan_step(step, examples, models, train, self._seed)
            scores = self._scorer.score(step, examples, plan)
        self._stop.check()
        with self._clock.phase("credit"):
            experiences, credit = self._algorithm.credit(examples, scores.signals)
        for text in credit.warnings:
            self._records.warn(f"step {step}: {text}")
        with self._clock.phase("learn"):
            plan = plan_learning(plan, experiences, models, train)
            learned = self._learner.learn(step, experiences, plan, scores.take_old_log_probs)
        with self._clock.phase("credit"):
            description = self._algorithm.describe(examples, scores.signals)
        for text in description.warnings:
            self._records.warn(f"step {step}: {text}")
        metrics: dict[str, Mapping[str, float]] = {
            "mismatch": scores.mismatch,
            "credit": flatten(credit),
            "description": flatten(description),
            "learning": flatten(learned.metrics),
        }
        return learned, metrics, mean_advantages(experiences)

    def _evaluate(self, step: int) -> Evaluation:
        """Metrics on held-out rows, of the weights that are about to be saved; none where no evaluation is due."""
        every_steps = self._sections.eval.every_steps
        due = step == self._num_steps or (every_steps and step % every_steps == 0)
        if self._parts.evaluator is None or not due:
            return Evaluation()
        with self._clock.phase("evaluate"):
            try:
                return self._parts.evaluator.evaluate(step)
            except RewardError as error:
                self._records.warn(f"evaluation at step {step} failed: {error}")
                return Evaluation()

    def _describe(
        self, step: int, batch: GroupBatch, examples: Sequence[Example], learned: LearnResult
    ) -> dict[str, Mapping[str, float]]:
        """The metrics of a step that the loop computes itself, by their producer."""
        metrics: dict[str, Mapping[str, float]] = {"source": batch.metrics, "workers": self._parts.gauge()}
        if self._online:
            metrics["responses"] = response_metrics(batch.groups)
            metrics["lag"] = lag_metrics(batch.groups, step - 1, self._sections.max_lag)
            metrics["rows"] = row_metrics(batch.groups)
        metrics["repairs"] = self._records.take_repair_metrics()
        metrics["loop"] = {
            "data/position": float(batch.position),
            "data/examples": float(len(examples)),
            "updates/applied": float(learned.num_updates),
            "updates/skipped": float(learned.num_skipped),
        }
        metrics["time"] = time_metrics(self._clock, batch)
        step_s = metrics["time"]["time/step"]
        metrics["throughput"] = throughput_metrics(step_s, batch, examples, self._parts.gpus)
        return metrics

    def _resume(self, point: ResumePoint) -> None:
        self._progress.restore(point)
        self._learner.skipped_updates.restore(point.state.recent_updates)
        self._records.directory.rewind(point.state.step)
        self._records.status(Status.RUNNING, point.state.step)
        self._records.note("resume", f"continuing after step {point.state.step} from {point.path}")

    def _export(self) -> Path:
        """Write the model of the exported role. Raises NumericsError where the run made no update."""
        state, needs = self._progress.state, self._algorithm.needs
        if not state.num_updates:
            raise NumericsError(
                f"{state.step} steps made no update: nothing was learned. See the warnings in events.jsonl"
            )
        directory = self._records.directory.model
        export_model(self._engines[needs.exported_role], directory)
        self._records.status(Status.DONE, state.step)
        self._records.say(f"done: {state.step} steps, {state.num_updates} updates")
        show_model(directory, needs.trains[needs.exported_role], self._records.say)
        return directory
