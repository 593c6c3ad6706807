"""The stream of groups at work: an engine and a reward source whose answers come when the test says so."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from rlhf.engines.fakes import FakeReward, FakeRollout
from rlhf.errors import RewardError, StallError, WorkerLostError
from rlhf.orchestrator.data.order import Order
from rlhf.orchestrator.step.batch_queue import BatchQueue
from rlhf.orchestrator.step.rollout_source import RolloutSource, ScoringPlan
from rlhf.orchestrator.step.sampler import RolloutPlan, Sampler
from rlhf.orchestrator.step.sources import GroupBatch
from rlhf.orchestrator.step.stream import StreamLimits
from rlhf.types import Prompt, Reward, Rollout, RolloutRequest, Sampling, ScoredGroup
from tests.unit.orchestrator.support import TOKENIZER, make_prompt

pytestmark = pytest.mark.timeout(30)

PLAN = RolloutPlan(group_size=2, sampling=Sampling(max_tokens=5), seed=1)
LIMITS = StreamLimits(batch_size=2)
SCORING = ScoringPlan()
WAIT_S = 10.0


class ManualEngine(FakeRollout):
    """Completes a group when the test says so. Groups are known by the order in which they were asked for."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER.num_tokens)
        self.receive(0, np.zeros(TOKENIZER.num_tokens))
        self.groups: list[list[tuple[RolloutRequest, Future[Rollout]]]] = []
        self.sizes_of_calls: list[int] = []
        self.aborted: list[str] = []
        self.changed = threading.Condition()

    def submit(self, requests: Sequence[RolloutRequest]) -> list["Future[Rollout]"]:
        assert self.awake, "asked while asleep"
        self.sizes_of_calls.append(len(requests))
        futures: list[Future[Rollout]] = [Future() for _ in requests]
        by_prompt: dict[str, list[tuple[RolloutRequest, Future[Rollout]]]] = defaultdict(list)
        for request, future in zip(requests, futures, strict=True):
            by_prompt[request.id.rpartition("/")[0]].append((request, future))
        with self.changed:
            self.groups += by_prompt.values()
            self.changed.notify_all()
        return futures

    def abort(self, request_ids: Collection[str]) -> None:
        with self.changed:
            self.aborted += request_ids
            self.changed.notify_all()
        for group in self.groups:
            for request, future in group:
                if request.id in request_ids and future.cancel():
                    future.set_running_or_notify_cancel()

    def wait_for(self, count: int) -> None:
        """Wait until `count` groups have been asked for."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.groups) >= count, WAIT_S), f"{len(self.groups)} asked for"

    def wait_for_abort(self) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.aborted, WAIT_S)

    def complete(self, *numbers: int) -> None:
        for number in numbers:
            for request, future in self.groups[number]:
                future.set_result(self._respond(request, self.table, self.version))

    @property
    def prompts(self) -> list[str]:
        return [group[0][0].prompt_id for group in self.groups]


class ManualReward(FakeReward):
    """Notes the prompts of each call, and may hold it until the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[str]] = []
        self.error: RewardError | None = None
        self.at_call: Callable[[], None] = lambda: None
        self.begun = threading.Semaphore(0)
        self.may_end = threading.Semaphore(1_000_000)

    def hold(self) -> None:
        self.may_end = threading.Semaphore(0)

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str], rollouts: Sequence[Rollout]) -> list[Reward]:
        if self.error is not None:
            raise self.error
        self.at_call()
        self.calls.append([prompt.id for prompt in prompts])
        self.begun.release()
        assert self.may_end.acquire(timeout=WAIT_S)
        return super().score(prompts, responses, rollouts)


@dataclass
class Bench:
    """A source with both, started."""

    limits: StreamLimits = LIMITS
    scoring: ScoringPlan = SCORING
    plan: RolloutPlan = PLAN
    keep: Callable[[ScoredGroup], bool] = lambda _: True
    engine: ManualEngine = field(default_factory=ManualEngine)
    rewards: ManualReward = field(default_factory=ManualReward)
    awake: list[bool] = field(default_factory=list)
    """What the source did to engines that sleep, in order."""
    timeout_s: float = WAIT_S
    num_steps: int = 9
    order: list[str] = field(default_factory=list)

    @contextmanager
    def open(self) -> Iterator[RolloutSource]:
        rows = Order([make_prompt(i) for i in range(40)], seed=0)
        self.order = [prompt.id for prompt in rows.take(40)]

        @contextmanager
        def awake() -> Iterator[None]:
            self.awake.append(True)
            self.engine.wake()
            yield
            self.engine.sleep()
            self.awake.append(False)

        sampler = Sampler(self.engine, self.rewards, TOKENIZER, awake)
        queue = BatchQueue(take_timeout_s=self.timeout_s)  # type: ignore[var-annotated]
        source = RolloutSource(rows, sampler, self.plan, self.limits, self.scoring, queue, self.keep)
        source.start(1, self.num_steps, 0)
        try:
            yield source
        finally:
            source.close()


def prompts_of(groups: Sequence[ScoredGroup]) -> list[str]:
    return [group.prompt.id for group in groups]


def test_a_group_is_scored_while_others_are_being_sampled() -> None:
    bench = Bench()
    with bench.open() as source:
        bench.engine.wait_for(2)
        bench.engine.complete(1)
        assert bench.rewards.begun.acquire(timeout=WAIT_S)
        assert bench.rewards.calls == [[bench.order[1]] * 2]
        bench.engine.complete(0)
        batch = source.take(1)
    assert prompts_of(batch.groups) == bench.order[:2], "rows in their order, whatever was complete first"
    assert (batch.position, batch.ahead) == (2, ())


def test_what_completes_while_a_call_is_under_way_shares_the_next_one() -> None:
    bench = Bench(StreamLimits(batch_size=4))
    bench.rewards.hold()
    with bench.open() as source:
        bench.engine.wait_for(4)
        bench.engine.complete(0)
        assert bench.rewards.begun.acquire(timeout=WAIT_S)
        bench.engine.complete(3, 1, 2)
        bench.rewards.may_end.release()
        assert bench.rewards.begun.acquire(timeout=WAIT_S)
        bench.rewards.may_end.release()
        source.take(1)
    first, *rest = bench.order[:4]
    assert bench.rewards.calls == [[first] * 2, [name for name in rest for _ in range(2)]]


def test_several_calls_may_be_under_way_so_that_a_stuck_one_holds_up_its_own_groups_only() -> None:
    bench = Bench(StreamLimits(batch_size=1, max_lag=2, order="ready"), ScoringPlan(concurrency=2))
    bench.rewards.hold()
    with bench.open() as source:
        bench.engine.wait_for(3)
        bench.engine.complete(0)
        assert bench.rewards.begun.acquire(timeout=WAIT_S)  # this call is stuck
        bench.engine.complete(1)
        assert bench.rewards.begun.acquire(timeout=WAIT_S)
        bench.rewards.may_end.release()
        first = source.take(1)
        bench.rewards.may_end.release()
        second = source.take(2)
    assert sorted([*prompts_of(first.groups), *prompts_of(second.groups)]) == sorted(bench.order[:2])


def test_a_whole_step_is_scored_at_once_with_engines_asleep() -> None:
    """What a reward model computes does not depend on timing, and has the devices to itself."""
    bench = Bench(StreamLimits(batch_size=3), ScoringPlan(whole_step=True))
    asleep: list[bool] = []
    bench.rewards.at_call = lambda: asleep.append(not bench.engine.awake)
    with bench.open() as source:
        bench.engine.wait_for(3)
        bench.engine.complete(2, 0)
        bench.engine.complete(1)
        source.take(1)
    assert bench.rewards.calls == [[name for name in bench.order[:3] for _ in range(2)]]
    assert asleep == [True]
    assert bench.awake == [True, False]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1)])
def test_groups_in_place_of_dropped_ones_are_asked_for_together(order: tuple[int, ...]) -> None:
    """Whatever is complete first, so that an engine that decodes in batches decodes the same ones."""
    bench = Bench(StreamLimits(batch_size=4), ScoringPlan(whole_step=True))
    bench.keep = lambda group: group.prompt.id not in bench.order[:2]
    with bench.open() as source:
        bench.engine.wait_for(4)
        for number in order:
            bench.engine.complete(number)
            time.sleep(0.02)
        bench.engine.wait_for(6)
        bench.engine.complete(4, 5)
        assert prompts_of(source.take(1).groups) == bench.order[2:6]
    assert bench.engine.sizes_of_calls[:2] == [4 * PLAN.group_size, 2 * PLAN.group_size]


def test_engines_sleep_when_a_step_has_its_groups() -> None:
    bench = Bench(keep=lambda group: group.prompt.id != bench.order[0])
    with bench.open() as source:
        bench.engine.wait_for(2)
        bench.engine.complete(0)
        bench.engine.wait_for(3)  # the first group was dropped, and another is asked for while the second goes on
        bench.engine.complete(1)
        bench.engine.complete(2)
        batch = source.take(1)
        assert bench.awake == [True, False]
        assert prompts_of(batch.groups) == bench.order[1:3]
        bench.engine.receive(1, bench.engine.table)
        source.release()
        bench.engine.wait_for(5)
        assert bench.awake == [True, False, True]


def test_a_call_waits_for_its_number_of_responses_and_no_longer_than_allowed() -> None:
    bench = Bench(StreamLimits(batch_size=4), ScoringPlan(call_size=4, call_wait_s=WAIT_S))
    with bench.open():
        bench.engine.wait_for(4)
        bench.engine.complete(0)
        assert not bench.rewards.begun.acquire(timeout=0.1)
        bench.engine.complete(2)
        assert bench.rewards.begun.acquire(timeout=WAIT_S)
        assert bench.rewards.calls == [[name for name in (bench.order[0], bench.order[2]) for _ in range(2)]]
    hasty = Bench(StreamLimits(batch_size=4), ScoringPlan(call_size=4, call_wait_s=0.05))
    with hasty.open():
        hasty.engine.wait_for(4)
        hasty.engine.complete(0)
        assert hasty.rewards.begun.acquire(timeout=WAIT_S)


def test_a_step_takes_what_is_ready_and_the_rest_goes_on() -> None:
    bench = Bench(StreamLimits(batch_size=2, max_lag=1, order="ready"))
    with bench.open() as source:
        bench.engine.wait_for(4)
        bench.engine.complete(3)
        bench.engine.complete(1)
        batch = source.take(1)
        assert prompts_of(batch.groups) == [bench.order[1], bench.order[3]]
        assert (batch.position, batch.ahead) == (0, (1, 3))
        assert batch.metrics["rollout/under_way"] == 2
        bench.engine.receive(1, bench.engine.table)
        source.release()
        bench.engine.wait_for(6)
        bench.engine.complete(0, 2)
        assert prompts_of(source.take(2).groups) == [bench.order[0], bench.order[2]]
        assert not bench.engine.aborted


def test_groups_that_got_too_old_are_aborted_and_asked_for_again() -> None:
    bench = Bench(StreamLimits(batch_size=1, extra=1, order="ready"))
    with bench.open() as source:
        bench.engine.wait_for(2)
        bench.engine.complete(1)
        source.take(1)
        bench.engine.wait_for_abort()
        assert bench.engine.aborted == [request.id for request, _ in bench.engine.groups[0]]
        bench.engine.receive(1, bench.engine.table)
        source.release()
        bench.engine.wait_for(4)
        assert bench.engine.prompts == [bench.order[index] for index in (0, 1, 0, 2)]
        again, before = bench.engine.groups[2], bench.engine.groups[0]
        assert not {request.seed for request, _ in again} & {request.seed for request, _ in before}
        bench.engine.complete(2)
        assert source.take(2).metrics["rollout/expired"] == 1


@pytest.mark.parametrize("error", [WorkerLostError("engine 0 died"), StallError("no token")])
def test_what_happens_to_an_engine_is_raised_at_once(error: Exception) -> None:
    bench = Bench()
    with bench.open() as source:
        bench.engine.wait_for(2)
        bench.engine.groups[0][0][1].set_exception(error)  # the other responses are still under way
        with pytest.raises(type(error), match=str(error)):
            source.take(1)


def test_a_reward_that_fails_is_raised_after_the_batches_that_are_ready() -> None:
    bench = Bench(StreamLimits(batch_size=1, max_lag=1))
    with bench.open() as source:
        bench.engine.wait_for(2)
        bench.engine.complete(0)
        assert bench.rewards.begun.acquire(timeout=WAIT_S)
        bench.rewards.error = RewardError("reward: down")
        bench.engine.complete(1)
        assert prompts_of(source.take(1).groups) == bench.order[:1]
        with pytest.raises(RewardError, match="down"):
            source.take(2)


def test_closing_gives_up_what_is_under_way() -> None:
    bench = Bench()
    with bench.open():
        bench.engine.wait_for(2)
    assert sorted(bench.engine.aborted) == sorted(request.id for group in bench.engine.groups for request, _ in group)


def test_a_step_that_is_never_complete_ends_the_wait_of_the_trainer() -> None:
    bench = Bench(timeout_s=0.1)
    with bench.open() as source, pytest.raises(StallError, match="no response was completed or scored"):
        source.take(1)


def test_a_run_goes_on_where_a_checkpoint_left_it() -> None:
    bench = Bench(replace(StreamLimits(batch_size=2), max_lag=1, order="ready"))
    rows = Order([make_prompt(i) for i in range(40)], seed=0)
    names = [prompt.id for prompt in rows.take(40)]
    queue = BatchQueue(take_timeout_s=WAIT_S)  # type: ignore[var-annotated]
    sampler = Sampler(bench.engine, bench.rewards, TOKENIZER)
    source = RolloutSource(rows, sampler, PLAN, bench.limits, ScoringPlan(), queue, lambda _: True)
    source.start(1, 9, 1, ahead=(2, 4))
    try:
        bench.engine.wait_for(4)
        assert bench.engine.prompts == [names[index] for index in (1, 3, 5, 6)]
    finally:
        source.close()


def test_only_what_goes_on_while_the_trainer_does_something_else_overlaps() -> None:
    bench = Bench(StreamLimits(batch_size=1, max_lag=1))

    def overlap_of(batch: GroupBatch) -> float:
        return batch.metrics["throughput/overlap_seconds"]

    with bench.open() as source, ThreadPoolExecutor(1) as trainer:
        bench.engine.wait_for(2)
        taken = trainer.submit(source.take, 1)
        while not source._overlap._is_held:
            threading.Event().wait(0.001)
        before = time.monotonic()
        threading.Event().wait(0.1)
        bench.engine.complete(0)
        first, waited_s = taken.result(WAIT_S), time.monotonic() - before
        assert overlap_of(first) < first.seconds["generate"] - 0.09 <= waited_s
        threading.Event().wait(0.1)  # the trainer learns
        bench.engine.complete(1)
        second = source.take(2)
    assert 0.09 < overlap_of(second) <= second.seconds["generate"] + second.seconds["score"]
