"""A whole run with fakes, put together as the composition root does."""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from rlhf.algorithms.base import Algorithm
from rlhf.algorithms.ppo import PPO
from rlhf.algorithms.rm import RM
from rlhf.algorithms.sft import SFT
from rlhf.config.algo import PpoSection, RmSection, SftSection
from rlhf.config.run import CheckpointSection, EvalSection, LogSection, TrainSection
from rlhf.engines.base import RewardSource, TokenScorer
from rlhf.engines.fakes import (
    FakeEmaReference,
    FakeReward,
    FakeRollout,
    FakeScorer,
    FakeTokenizer,
    FakeTrainEngine,
)
from rlhf.orchestrator.data.order import Order
from rlhf.orchestrator.evaluation import Evaluator
from rlhf.orchestrator.loop import Loop, LoopSections, Parts
from rlhf.orchestrator.run.checkpoint import Checkpoints, RunState
from rlhf.orchestrator.run.console import PlainConsole
from rlhf.orchestrator.run.preemption import StopRequest
from rlhf.orchestrator.run.records import Records
from rlhf.orchestrator.run.resume import find_resume_point
from rlhf.orchestrator.run.run_directory import RunDirectory
from rlhf.orchestrator.run.schedule import RunLength
from rlhf.orchestrator.run.trackers import make_trackers
from rlhf.orchestrator.step.batch_queue import BatchQueue
from rlhf.orchestrator.step.learning import Pretraining
from rlhf.orchestrator.step.metrics import GpuBudget
from rlhf.orchestrator.step.rollout_source import RolloutSource, ScoringPlan
from rlhf.orchestrator.step.sampler import RolloutPlan, Sampler
from rlhf.orchestrator.step.sources import GroupSource, OfflineSource
from rlhf.orchestrator.step.stream import StreamLimits
from rlhf.orchestrator.step.token_scores import Models
from rlhf.types import (
    FinishReason,
    Head,
    Prompt,
    Response,
    Reward,
    Role,
    Rollout,
    Sampling,
    ScoredGroup,
)

TOKENIZER = FakeTokenizer()
LOG = LogSection(tensorboard=False, sample_every_steps=2)
TRAIN = TrainSection(
    batch_size=3, max_tokens_per_micro_batch=24, step_timeout_s=20.0, mismatch_warn=0.0, mismatch_stop=0.0
)


def make_prompt(number: int) -> Prompt:
    text = TOKENIZER.alphabet[: 1 + number % 5]
    return Prompt(id=f"p{number}", token_ids=np.array(TOKENIZER.encode(text), dtype=np.int64), text=text)


def given_group(number: int, answers: Sequence[str], rewards: Sequence[float]) -> ScoredGroup:
    """A row of a data set: a demonstration, or a preference."""
    return ScoredGroup(
        prompt=make_prompt(number),
        responses=tuple(
            Response(
                id=f"r{number}-{i}",
                prompt_id=f"p{number}",
                token_ids=np.array([*TOKENIZER.encode(answer), 1], dtype=np.int64),
                finish_reason=FinishReason.STOP,
            )
            for i, answer in enumerate(answers)
        ),
        texts=tuple(answers),
        rewards=tuple(Reward(total=reward) for reward in rewards),
    )


def as_sampled(group: ScoredGroup) -> ScoredGroup:
    """The same responses, as if sampled from version 0."""
    rollouts = tuple(
        Rollout(
            id=response.id,
            prompt_id=response.prompt_id,
            token_ids=response.token_ids,
            finish_reason=response.finish_reason,
            log_probs=np.zeros(len(response.token_ids), dtype=np.float32),
            weight_version=0,
        )
        for response in group.responses
    )
    return replace(group, responses=rollouts)


def labeled_group(number: int, answers: Sequence[str], labels: Sequence[bool]) -> ScoredGroup:
    """A row whose answers are labeled desirable or not."""
    return replace(given_group(number, answers, [float(label) for label in labels]), labels=tuple(labels))


@dataclass
class Run:
    """One launch of a driver. Change a field before `loop` to break something."""

    path: Path
    algorithm: Algorithm
    engines: dict[Role, FakeTrainEngine]
    num_steps: int = 6
    num_prompts: int = 7
    batch_size: int = 4
    rollout: FakeRollout = field(default_factory=lambda: FakeRollout(TOKENIZER.num_tokens))
    rewards: RewardSource = field(default_factory=FakeReward)
    rows: Sequence[ScoredGroup] = ()
    train: TrainSection = TRAIN
    num_epochs: int = 2
    critic_warmup_steps: int = 0
    seed: int = 11
    max_lag: int = 0
    checkpoint_every: int = 2
    evaluate_every: int = 0
    keep: int = 2
    evaluator: Evaluator | None = None
    pretraining: Pretraining | None = None
    group_size: int = 2
    max_rounds: int = 10
    greedy_baseline: bool = False
    reference: TokenScorer = field(default_factory=lambda: FakeScorer(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS))
    stop: StopRequest = field(default_factory=lambda: StopRequest(20.0))
    out: io.StringIO = field(default_factory=io.StringIO)
    keep_group: Callable[[ScoredGroup], bool] | None = None
    source: GroupSource | None = None
    config: Mapping[str, str] = field(default_factory=dict)
    takes_turns: bool = False

    def set_train(self, **settings: float) -> None:
        """Change settings of the config's `train` section."""
        self.train = self.train.model_copy(update=settings)

    def make_source(self) -> GroupSource:
        if not self.algorithm.needs.online:
            return OfflineSource(Order(self.rows, seed=3), self.batch_size, self.algorithm.keep)
        return RolloutSource(
            Order([make_prompt(i) for i in range(self.num_prompts)], seed=3),
            Sampler(self.rollout, self.rewards, TOKENIZER),
            RolloutPlan(
                group_size=self.group_size,
                sampling=Sampling(max_tokens=6),
                seed=self.seed,
                greedy_baseline=self.greedy_baseline,
            ),
            StreamLimits(batch_size=self.batch_size, max_lag=self.max_lag, max_rounds=self.max_rounds),
            ScoringPlan(),
            BatchQueue(take_timeout_s=20.0, check=self.stop.check),
            self.keep_group or self.algorithm.keep,
        )

    def run(self, *, resume: bool = False) -> Path:
        """Run it to the end."""
        with self.open(resume=resume) as (records, checkpoints, fresh):
            point = None
            if resume:
                status = records.directory.read_status()
                point = find_resume_point(checkpoints, fresh, num_steps=self.num_steps, status=status, accepted=())
            return self.loop(records, checkpoints, fresh).run(point)

    @contextmanager
    def open(self, *, resume: bool) -> Iterator[tuple[Records, Checkpoints, RunState]]:
        """Hold the run's folder."""
        with RunDirectory.open(self.path, resume=resume) as directory:
            open_trackers = partial(
                make_trackers,
                LOG,
                metrics_path=directory.metrics,
                tensorboard_folder=directory.tensorboard,
                name="t",
                config={},
                warn=lambda _: None,
            )
            records = Records(directory, open_trackers, PlainConsole(self.num_steps, self.out), LOG, self.num_steps)
            checkpoints = Checkpoints(directory.checkpoints, keep=self.keep, warn=records.warn, repaired=records.repair)
            fresh = RunState(
                step=0,
                seed=self.seed,
                ranks={role: engine.num_ranks for role, engine in self.engines.items()},
                config=dict(self.config),
            )
            with records.open():
                yield records, checkpoints, fresh

    def loop(self, records: Records, checkpoints: Checkpoints, fresh: RunState) -> Loop:
        """The loop over these parts."""
        how = self.algorithm.needs.ema_reference
        ema_reference = FakeEmaReference(self.engines[Role.POLICY], how.decay) if how is not None else None
        return Loop(
            Parts(
                algorithm=self.algorithm,
                models=Models(
                    trained=self.engines, reference=ema_reference or self.reference, ema_reference=ema_reference
                ),
                source=self.source or self.make_source(),
                evaluator=self.evaluator,
                pretraining=self.pretraining,
                gauge=lambda: {"memory/policy": 0.5},
                takes_turns=self.takes_turns,
                gpus=GpuBudget(num_gpus=2, peak_flops=1e6, training_flops=lambda context: 100.0 + context),
            ),
            LoopSections(
                train=self.train,
                eval=EvalSection(every_steps=self.evaluate_every),
                checkpoint=CheckpointSection(every_steps=self.checkpoint_every),
                max_lag=self.max_lag,
            ),
            RunLength(
                num_steps=self.num_steps,
                examples_per_step=self.batch_size * self.group_size,
                batch_size=self.train.batch_size,
                num_epochs=self.num_epochs,
                critic_warmup_steps=self.critic_warmup_steps,
            ),
            records=records,
            checkpoints=checkpoints,
            stop=self.stop,
            fresh=fresh,
        )


def metrics_of(run: Run) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def ppo_run(path: Path, *, section: PpoSection | None = None, num_ranks: int = 2, **changes: object) -> Run:
    """Policy and critic on sampled responses; the reward is the share of `a`."""
    rollout = FakeRollout(TOKENIZER.num_tokens)
    engines = {
        Role.POLICY: FakeTrainEngine(
            np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, num_ranks=num_ranks, rollout=rollout
        ),
        Role.CRITIC: FakeTrainEngine(np.zeros(TOKENIZER.num_tokens), Head.VALUES),
    }
    algorithm = PPO(section or PpoSection(normalize_rewards=True))
    return replace(Run(path, algorithm, engines, rollout=rollout), **changes)  # type: ignore[arg-type]


def sft_run(path: Path, **changes: object) -> Run:
    """A policy on demonstrations of `a` and `b`."""
    engines = {Role.POLICY: FakeTrainEngine(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, num_ranks=2)}
    rows = [given_group(i, ["ab"[i % 2] * (1 + i % 3)], [0.0]) for i in range(7)]
    return replace(Run(path, SFT(SftSection()), engines, rows=rows), **changes)  # type: ignore[arg-type]


def rm_run(path: Path, **changes: object) -> Run:
    """A reward model on rankings. A score depends on a response's last token, so responses end in different tokens."""
    engines = {Role.REWARD: FakeTrainEngine(np.zeros(TOKENIZER.num_tokens), Head.SCORES, num_ranks=2)}
    rows = []
    for i in range(7):
        group = given_group(i, ["ba", "ab", "ac"], [2.0, 1.0, 0.0])
        cut = tuple(replace(r, token_ids=r.token_ids[:-1]) for r in group.responses)
        rows.append(replace(group, responses=cut))
    return replace(Run(path, RM(RmSection()), engines, rows=rows), **changes)  # type: ignore[arg-type]


def tables(run: Run) -> dict[Role, bytes]:
    """The bytes of every trained table."""
    return {role: engine.table.tobytes() for role, engine in run.engines.items()}
