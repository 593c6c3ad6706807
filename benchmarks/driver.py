"""What the driver itself costs per response: credit, packing, bookkeeping, decoding and records.

    python -m benchmarks.driver [--algorithm grpo|ppo] [--responses 8000 32000 100000] [--tokens 512] [--quick]

Runs the real training loop on responses that were made beforehand. Its engines compute nothing: their outputs come from
the token ids, which costs little and is subtracted. Each row is a process of its own, which runs two steps of all
responses and one of a single group. The second step is measured, with its records, which are written in the third: the
first also waits for the system to find memory for it, which is then reused.

Columns are milliseconds per response of one thread: CPU time without that of the engines, and its parts. `log-probs`
contains the selection of examples, planning, packing and the mismatch between sampler and trainer; `learn` builds the
micro-batches; `rest` are the metrics. `GB` are the bytes of the arrays: what the rollout engine gives (an id and a
log-prob for each token of a response), and what is learned from (an id, a mask and the signals for each token of a
sequence). `peak` is the largest resident memory, above that before the responses were made, over those bytes.
"""

import argparse
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil

from benchmarks.tables import show
from rlhf.algorithms.base import Algorithm, Objective
from rlhf.algorithms.grpo import GRPO
from rlhf.algorithms.ppo import PPO
from rlhf.config.algo import GrpoSection, PpoSection
from rlhf.config.run import CheckpointSection, EvalSection, LogSection, TrainSection
from rlhf.engines.base import PassReport
from rlhf.engines.models.fresh_model import train_tokenizer
from rlhf.engines.models.tokenizer import HfTokenizer, load_tokenizer
from rlhf.orchestrator.loop import Loop, LoopSections, Parts
from rlhf.orchestrator.run.checkpoint import Checkpoints, RunState
from rlhf.orchestrator.run.console import SilentConsole
from rlhf.orchestrator.run.preemption import StopRequest
from rlhf.orchestrator.run.records import Records
from rlhf.orchestrator.run.run_directory import RunDirectory
from rlhf.orchestrator.run.schedule import RunLength
from rlhf.orchestrator.step.sources import GroupBatch
from rlhf.orchestrator.step.token_scores import Models
from rlhf.types import (
    Example,
    Experience,
    FinishReason,
    FloatArray,
    IntArray,
    Json,
    Metrics,
    PackedTokens,
    Prompt,
    Reward,
    Rollout,
    ScoredGroup,
    Signal,
    Signals,
    StepReport,
    SyncReport,
    TrainBatch,
)

PROMPT_TOKENS = 128
GROUP_SIZE = 8
NUM_RANKS = 8
MINIBATCHES = 4
"""Optimizer steps in one step of the loop."""
MICRO_BATCH_TOKENS = 16384
MEASURED_STEP = 2
NUM_STEPS = 3
RESPONSES = (8_000, 32_000, 100_000)
PHASES = ("decode", "log-probs", "credit", "learn", "record", "rest")
ID_BYTES, MASK_BYTES, SIGNAL_BYTES = 8, 1, 4
ALGORITHMS = ("grpo", "ppo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A step that is measured."""

    algorithm: str
    responses: int
    tokens: int
    """Mean length of a response; lengths lie between a half and one and a half of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a step cost."""

    cpu_s: Mapping[str, float]
    """By phase."""
    engines_s: float
    """What of it the engines took."""
    array_bytes: int
    peak_bytes: int


class PhaseTimes:
    """CPU seconds of the process by phase, in the measured step alone."""

    def __init__(self) -> None:
        self.cpu_s = dict.fromkeys(PHASES, 0.0)
        self._last = 0.0
        self._step = 0

    def step(self) -> None:
        """A step begins: that before it has ended with its records."""
        self.end("record")
        self._step += 1

    def end(self, phase: str) -> None:
        """What was done since the end of the phase before was this one."""
        now = time.process_time()
        if self._step == MEASURED_STEP:
            self.cpu_s[phase] += now - self._last
        self._last = now

    def leave_out(self) -> None:
        """What was done since the end of the phase before is part of none."""
        self._last = time.process_time()


class InstantEngine:
    """A model that computes nothing: the log-prob or value of a token follows from its id. Counts its own CPU time."""

    def __init__(self, signals: set[Signal], times: PhaseTimes) -> None:
        """`signals` receives the signals that batches hold."""
        self.num_ranks = NUM_RANKS
        self.cpu_s = 0.0
        self._signals = signals
        self._times = times

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        start = time.thread_time()
        outputs = [outputs_of(batch.token_ids.astype(np.float32)) for batch in batches]
        self.cpu_s += time.thread_time() - start
        return outputs

    def forward_backward(self, batches: Sequence[TrainBatch]) -> PassReport:
        self._signals |= set(batches[0].signals)
        return PassReport(metrics=Metrics(sums={f"{batches[0].objective}/loss": 0.0}))

    def optim_step(self) -> StepReport:
        return StepReport(grad_norm=1.0, lr=1e-6, finite=True)

    def send_weights(self, version: int) -> SyncReport:
        self._times.end("learn")
        return SyncReport(version=version, digest="", num_bytes=0, seconds=0.0, num_buckets=1, num_remote_calls=1)

    def save(self, directory: Path) -> None:
        (directory / "nothing").touch()

    def load(self, directory: Path) -> None:
        """There is nothing to load."""

    def export(self, directory: Path) -> None:
        (directory / "nothing").touch()


class TimedCredit(Algorithm):
    """An algorithm whose credit is a phase."""

    def __init__(self, algorithm: Algorithm, times: PhaseTimes) -> None:
        self.needs = algorithm.needs
        self._algorithm = algorithm
        self._times = times

    def credit(self, examples: Sequence[Example], signals: Sequence[Signals]) -> tuple[list[Experience], Metrics]:
        self._times.end("log-probs")
        credited = self._algorithm.credit(examples, signals)
        self._times.end("credit")
        return credited

    def objectives(self) -> Mapping[str, Objective]:
        return self._algorithm.objectives()


def outputs_of(ids: FloatArray) -> FloatArray:
    """A number between -2 and 0 for each token id."""
    ids *= -0.001
    return ids


class MadeResponses:
    """A source of responses that are made up, uncounted, when they are asked for. Decodes them, as a run does after
    sampling."""

    def __init__(self, case: Case, tokenizer: HfTokenizer, token_ids: Sequence[int], times: PhaseTimes) -> None:
        self._times = times
        self._tokenizer = tokenizer
        self._stream = np.array(token_ids, dtype=np.int64)
        self._generator = np.random.default_rng(0)
        self._mean = case.tokens
        self._num_groups = case.responses // GROUP_SIZE
        self.num_tokens = 0
        """Of the measured step, without prompts."""

    def start(self, first_step: int, last_step: int, position: int, ahead: Collection[int] = ()) -> None:
        """The responses are there."""

    def take(self, step: int) -> GroupBatch:
        self._times.step()
        sampled = [self._make(step, number) for number in range(self._num_groups if step <= MEASURED_STEP else 1)]
        if step == MEASURED_STEP:
            self.num_tokens = sum(len(rollout.token_ids) for _, rollouts in sampled for rollout in rollouts)
        self._times.leave_out()
        groups = tuple(self._scored(prompt, rollouts) for prompt, rollouts in sampled)
        self._times.end("decode")
        return GroupBatch(groups=groups, position=step)

    def release(self) -> None:
        """There are no slots."""

    def close(self) -> None:
        """There is nothing to close."""

    def _make(self, step: int, number: int) -> tuple[Prompt, tuple[Rollout, ...]]:
        ids = self._cut(PROMPT_TOKENS)
        prompt = Prompt(id=f"prompt-{number}", token_ids=ids, text=self._tokenizer.decode(ids), label="42")
        lengths = self._generator.integers(self._mean // 2, 3 * self._mean // 2, GROUP_SIZE, endpoint=True)
        return prompt, tuple(self._rollout(prompt, k, length, step) for k, length in enumerate(lengths.tolist()))

    def _rollout(self, prompt: Prompt, number: int, length: int, step: int) -> Rollout:
        ids = self._cut(length)
        return Rollout(
            id=f"{prompt.id}/{number}",
            prompt_id=prompt.id,
            token_ids=ids,
            log_probs=outputs_of(ids.astype(np.float32)),
            finish_reason=FinishReason.STOP,
            weight_version=step - 1,
        )

    def _cut(self, length: int) -> IntArray:
        start = int(self._generator.integers(len(self._stream) - length))
        return self._stream[start : start + length].copy()

    def _scored(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> ScoredGroup:
        rewards = self._generator.random(len(rollouts)).tolist()
        return ScoredGroup(
            prompt=prompt,
            responses=tuple(rollouts),
            texts=tuple(self._tokenizer.decode(rollout.token_ids) for rollout in rollouts),
            rewards=tuple(Reward(total=reward, parts={"rule": reward}) for reward in rewards),
        )


@dataclass(frozen=True, slots=True)
class EndOfMetrics:
    """A tracker that knows that a step's metrics are complete, and its records come next."""

    times: PhaseTimes

    def log(self, step: int, metrics: Mapping[str, Json]) -> None:
        self.times.end("rest")

    def close(self) -> None:
        """There is nothing to close."""


def make_text() -> list[str]:
    """Words of random letters: a text of which a token holds about four characters."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(2000)]
    return [" ".join(draw.choices(words, k=40)) for _ in range(2000)]


def measure(case: Case) -> Figures:
    """What a step costs. Memory is right in a process that has measured nothing yet."""
    with tempfile.TemporaryDirectory() as name:
        folder, texts = Path(name), make_text()
        train_tokenizer(texts, 4096, folder / "model")
        tokenizer = load_tokenizer(str(folder / "model"))
        token_ids = [token for text in texts for token in tokenizer.encode(text)]
        first = replace(case, responses=GROUP_SIZE)
        run(first, tokenizer, token_ids, folder / "first")  # what is imported and made once
        before = psutil.Process().memory_info().rss
        figures = run(case, tokenizer, token_ids, folder / "run")
    return replace(figures, peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def run(case: Case, tokenizer: HfTokenizer, token_ids: Sequence[int], folder: Path) -> Figures:
    """Run a step of the loop."""
    times, signals = PhaseTimes(), set[Signal]()
    source = MadeResponses(case, tokenizer, token_ids, times)
    algorithm = TimedCredit(GRPO(GrpoSection()) if case.algorithm == "grpo" else PPO(PpoSection()), times)
    trained = {role: InstantEngine(signals, times) for role in algorithm.needs.trains}
    reference = InstantEngine(signals, times)
    with RunDirectory.open(folder, resume=False) as directory:
        records = Records(directory, lambda: [EndOfMetrics(times)], SilentConsole(), LogSection(), num_steps=NUM_STEPS)
        models = Models(trained=trained, reference=reference)
        loop = make_loop(case, Parts(algorithm=algorithm, models=models, source=source), records)
        with records.open():
            loop.run()
    given = source.num_tokens * (ID_BYTES + SIGNAL_BYTES)
    num_sequence_tokens = source.num_tokens + PROMPT_TOKENS * case.responses
    learned = num_sequence_tokens * (ID_BYTES + MASK_BYTES + SIGNAL_BYTES * len(signals))
    return Figures(
        cpu_s=times.cpu_s,
        engines_s=reference.cpu_s + sum(engine.cpu_s for engine in trained.values()),
        array_bytes=given + learned,
        peak_bytes=0,
    )


def make_loop(case: Case, parts: Parts, records: Records) -> Loop:
    """The loop: two steps of all responses, and one of a group."""
    batch_size = max(1, case.responses // MINIBATCHES)
    train = TrainSection(batch_size=batch_size, max_tokens_per_micro_batch=MICRO_BATCH_TOKENS)
    folder = records.directory.checkpoints
    return Loop(
        parts,
        LoopSections(train=train, eval=EvalSection(), checkpoint=CheckpointSection(every_steps=1000), max_lag=1),
        RunLength(num_steps=NUM_STEPS, examples_per_step=case.responses, batch_size=batch_size),
        records=records,
        checkpoints=Checkpoints(folder, keep=1, warn=records.warn, repaired=records.repair),
        stop=StopRequest(20.0),
        fresh=RunState(step=0, seed=0, ranks=dict.fromkeys(parts.models.trained, NUM_RANKS), config={}),
    )


def row(case: Case, figures: Figures) -> list[str]:
    """The cells of a case."""

    def ms(seconds: float) -> str:
        return f"{1000 * seconds / case.responses:.3f}"

    return [
        f"{case.responses:,} x {case.tokens:,}",
        ms(sum(figures.cpu_s.values()) - figures.engines_s),
        *(ms(seconds) for seconds in figures.cpu_s.values()),
        ms(figures.engines_s),
        f"{figures.array_bytes / 1e9:.2f}",
        f"{figures.peak_bytes / figures.array_bytes:.2f}",
    ]


HEADINGS = ("responses x tokens", "ms", *PHASES, "engines", "GB", "peak")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="grpo")
    parser.add_argument("--responses", type=int, nargs="+", default=RESPONSES, help="responses in a step")
    parser.add_argument("--tokens", type=int, default=512, help="mean tokens of a response")
    parser.add_argument("--quick", action="store_true", help="only 800 responses in a step, to see whether it works")
    args = parser.parse_args()
    sizes = [800] if args.quick else args.responses
    cases = [Case(algorithm=args.algorithm, responses=size, tokens=args.tokens) for size in sizes]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as processes:
        rows = [row(case, figures) for case, figures in zip(cases, processes.map(measure, cases), strict=True)]
    show(f"{args.algorithm}: the driver, milliseconds per response", HEADINGS, rows)


if __name__ == "__main__":
    main()
