"""Runs with fakes that something happens to at the n-th call of any engine."""

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf.algorithms.sft import SFT
from rlhf.config.algo import SftSection
from rlhf.engines.base import PassReport
from rlhf.engines.fakes import FakeReward, FakeRollout, FakeTrainEngine
from rlhf.orchestrator.data.order import Order
from rlhf.orchestrator.step.learning import Pretraining
from rlhf.types import (
    FloatArray,
    Head,
    PackedTokens,
    Prompt,
    Reward,
    Role,
    Rollout,
    RolloutRequest,
    StepReport,
    SyncReport,
    TrainBatch,
)
from tests.unit.orchestrator.support import TOKENIZER, Run, given_group, ppo_run, tables


class KilledError(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


class CallCounter:
    """Acts at the n-th call of any engine, whichever thread makes it."""

    def __init__(self, calls: int, act: Callable[[], None]) -> None:
        self.names: list[str] = []
        self._calls = calls
        self._act = act
        self._lock = threading.Lock()

    def count(self, name: str) -> None:
        with self._lock:
            self.names.append(name)
            if len(self.names) == self._calls:
                self._act()


class CountedEngine(FakeTrainEngine):
    def __init__(self, counter: CallCounter, name: str, head: Head, rollout: FakeRollout | None = None) -> None:
        super().__init__(FakeRollout(TOKENIZER.num_tokens).table, head, rollout=rollout)
        self._counter = counter
        self._name = name

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        self._counter.count(f"{self._name} forward")
        return super().forward(batches)

    def forward_backward(self, batches: Sequence[TrainBatch]) -> PassReport:
        self._counter.count(f"{self._name} forward_backward")
        return super().forward_backward(batches)

    def optim_step(self) -> StepReport:
        self._counter.count(f"{self._name} optim_step")
        return super().optim_step()

    def send_weights(self, version: int) -> SyncReport:
        self._counter.count(f"{self._name} send_weights")
        return super().send_weights(version)

    def save(self, directory: Path) -> None:
        super().save(directory)
        self._counter.count(f"{self._name} save")

    def export(self, directory: Path) -> None:
        self._counter.count(f"{self._name} export")
        super().export(directory)


class CountedRollout(FakeRollout):
    def __init__(self, counter: CallCounter) -> None:
        super().__init__(TOKENIZER.num_tokens)
        self._counter = counter

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Rollout]:
        self._counter.count("generate")
        return super().generate(requests)


class CountedReward(FakeReward):
    def __init__(self, counter: CallCounter) -> None:
        super().__init__()
        self._counter = counter

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        self._counter.count("score")
        return super().score(prompts, responses, rollouts)


def counted_run(path: Path, counter: CallCounter) -> Run:
    rollout = CountedRollout(counter)
    run = ppo_run(path, num_steps=5, rollout=rollout, rewards=CountedReward(counter))
    run.set_train(batch_size=5)
    run.engines = {
        Role.POLICY: CountedEngine(counter, "policy", Head.LOG_PROBS, rollout),
        Role.CRITIC: CountedEngine(counter, "critic", Head.VALUES),
    }
    run.pretraining = Pretraining(
        Order([given_group(i, ["hh"], [0.0]) for i in range(5)], seed=0), SFT(SftSection()), batch_size=2
    )
    return run


def kill() -> None:
    raise KilledError


def evidence(run: Run) -> tuple[dict[Role, bytes], list[dict[str, float]], bytes]:
    """Weights, metrics but for times, and the last step's responses."""
    rows = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    metrics = [
        {name: value for name, value in row.items() if not name.startswith(("time", "throughput"))} for row in rows
    ]
    return tables(run), metrics, (run.path / "rollouts/step_000005.jsonl").read_bytes()
