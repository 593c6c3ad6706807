"""Groups that the policy samples now: a stream of them, each sampled, scored and handed over by itself."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue

from rlhf.errors import RewardError
from rlhf.orchestrator.step.batch_queue import BatchQueue
from rlhf.orchestrator.step.rows import Rows
from rlhf.orchestrator.step.sampled_metrics import describe_sampled
from rlhf.orchestrator.step.sampler import RolloutPlan, Sampler, make_group, make_requests, scored_part
from rlhf.orchestrator.step.sources import GroupBatch
from rlhf.orchestrator.step.stream import Asked, Batch, GroupStream, StreamLimits
from rlhf.orchestrator.step.waiting import in_thread
from rlhf.stopwatch import Stopwatch
from rlhf.types import Prompt, Reward, Rollout, RolloutRequest, ScoredGroup

CLOSE_TIMEOUT_S = 5.0
SHORTEST_WAIT_S = 0.01

Scores = tuple[list[str], list[Reward]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringPlan:
    """Which responses share a call of the reward source. The responses of a group always do."""

    whole_step: bool = False
    """Score only when nothing is being sampled: a call is the same whatever the timing, and so are the groups that are
    asked for in place of dropped ones. For scores and log-probs that depend on what else is in the call, as the last
    bits of a model's do, and for models that need the engines' memory."""
    call_size: int = 0
    """Responses that a call waits for; 0: it begins with what is complete."""
    call_wait_s: float = 0.0
    """Longest wait for that many."""
    concurrency: int = 1
    """Calls at the same time."""


@dataclass(slots=True)
class _Group:
    """A group on its way."""

    asked: Asked
    prompt: Prompt
    requests: Sequence[RolloutRequest]
    responses: "Sequence[Future[Rollout]]" = ()
    asked_at: float = field(default_factory=time.monotonic)
    complete_at: float = 0.0
    sampled: ScoredGroup | None = None
    kept: ScoredGroup | None = None


class RolloutSource:
    """A `GroupSource` that samples and scores. `GroupStream` has the rules; here is what waits.

    One thread, the only one that touches the stream and its groups.
        consumes: events: the responses of a group are complete, a call of the reward source has returned, new weights
        are live, close. Produces: requests, calls of the reward source (each in a thread of its own), batches.
        Waits for: the next event. Unblocked by: any. Engines and reward sources end by themselves what they were asked
        for, with an error after their deadlines; `take` has a deadline for the whole.
    An error in the thread is raised by `take`.
    """

    def __init__(
        self,
        prompts: Rows[Prompt],
        sampler: Sampler,
        plan: RolloutPlan,
        limits: StreamLimits,
        scoring: ScoringPlan,
        batches: BatchQueue[GroupBatch],
        keep: Callable[[ScoredGroup], bool],
    ) -> None:
        self._prompts = prompts
        self._sampler = sampler
        self._plan = plan
        self._limits = limits
        self._scoring = scoring
        self._batches = batches
        self._keep = keep
        self._events: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._stream: GroupStream
        self._sampling: dict[int, _Group] = {}
        """Groups whose responses are not complete, by number."""
        self._unscored: dict[int, _Group] = {}
        """Groups that wait for a call of the reward source."""
        self._scored: dict[int, _Group] = {}
        """Groups that wait for their step."""
        self._num_calls = 0
        self._dropped: list[_Group] = []
        self._num_expired = 0
        self._seen: dict[int, Counter[str]] = defaultdict(Counter)
        self._awake = ExitStack()
        self._is_awake = False
        self._clocks = {"generate": Stopwatch(), "score": Stopwatch()}
        self._overlap = Stopwatch()

    def start(self, first_step: int, last_step: int, position: int, ahead: Collection[int] = ()) -> None:
        self._stream = GroupStream(
            self._limits, first_step=first_step, last_step=last_step, position=position, ahead=ahead
        )
        self._thread = threading.Thread(target=self._run, name="rollout-stream", daemon=True)
        self._thread.start()

    def take(self, step: int) -> GroupBatch:
        self._events.put(partial(self._overlap.hold, True))
        try:
            return self._batches.take(step)
        finally:
            self._events.put(partial(self._overlap.hold, False))

    def release(self) -> None:
        self._events.put(self._stream.release)

    def close(self) -> None:
        """Give up what is under way."""
        self._events.put(self._close)
        self._batches.close()
        if self._thread is not None:
            self._thread.join(CLOSE_TIMEOUT_S)

    def _close(self) -> None:
        self._is_closed = True
        self._abort(list(self._sampling))

    def _run(self) -> None:
        try:
            while not self._is_closed:
                self._advance()
                self._next_event()()
                while not self._events.empty():  # all that has happened, before anything is done about it
                    self._events.get()()
        except BaseException as error:
            # The boundary of the thread: the trainer raises it.
            self._batches.fail(error)

    def _next_event(self) -> Callable[[], object]:
        """The next thing that happens; that groups have waited long enough for a call of the reward source is one."""
        if not self._scoring.call_size or not self._unscored or self._num_calls >= self._scoring.concurrency:
            return self._events.get()
        since = min(group.complete_at for group in self._unscored.values())
        try:
            return self._events.get(timeout=max(SHORTEST_WAIT_S, since + self._scoring.call_wait_s - time.monotonic()))
        except Empty:
            return lambda: None

    def _advance(self) -> None:
        """Do everything that can be done now."""
        self._expire()
        while (batch := self._form()) is not None:
            self._batches.put(batch)
            self._expire()
        if asked := self._stream.ask():
            self._ask(asked)
        self._score()
        self._clocks["generate"].run(bool(self._sampling))
        self._clocks["score"].run(bool(self._num_calls))
        self._overlap.run(bool(self._sampling or self._num_calls))

    def _ask(self, asked: Sequence[Asked]) -> None:
        """Ask the engines for groups, in one call."""
        self._hold_engines(True)
        groups = []
        for one in asked:
            self._prompts.position = one.row
            prompts = self._prompts.take(1)
            requests = make_requests(one.step, prompts, self._plan, self._seen[one.step])
            groups.append(_Group(one, prompts[0], requests))
        self._sampling.update((group.asked.number, group) for group in groups)
        self._clocks["generate"].run(True)
        responses = self._sampler.submit([request for group in groups for request in group.requests])
        width = len(self._plan.draws)
        for index, group in enumerate(groups):
            group.responses = responses[index * width : (index + 1) * width]
        for group in groups:
            for response in group.responses:
                response.add_done_callback(partial(self._tell_complete, group))

    def _tell_complete(self, group: _Group, ended: "Future[Rollout]") -> None:
        """In the thread that ended a response: the last one of a group, or an error, is an event."""
        self._batches.mark_progress()
        if not ended.cancelled() and ended.exception() is not None:
            self._events.put(ended.result)  # which raises it
        elif all(response.done() for response in group.responses):
            self._events.put(partial(self._sampled, group))

    def _sampled(self, group: _Group) -> None:
        if self._sampling.get(group.asked.number) is group:
            for response in group.responses:
                response.result()
            del self._sampling[group.asked.number]
            group.complete_at = time.monotonic()
            self._unscored[group.asked.number] = group

    def _score(self) -> None:
        """Begin calls of the reward source with groups that wait for one."""
        plan = self._scoring
        if plan.whole_step and not self._sampling:
            self._hold_engines(False)
        while self._unscored and self._num_calls < plan.concurrency:
            groups = self._due()
            if not groups:
                return
            for group in groups:
                del self._unscored[group.asked.number]
            self._num_calls += 1
            rollouts = [response.result() for group in groups for response in group.responses]
            prompts = [group.prompt for group in groups for _ in group.responses]
            call = in_thread(self._sampler.score, prompts, rollouts)
            call.add_done_callback(partial(self._tell_returned, groups))

    def _due(self) -> list[_Group]:
        """The groups of the next call; none if it is too early for one."""
        plan, width = self._scoring, len(self._plan.draws)
        groups = sorted(self._unscored.values(), key=lambda group: group.asked.row)
        if plan.whole_step:
            return [] if self._sampling or self._num_calls else groups
        if not plan.call_size:
            return groups
        waited_s = time.monotonic() - min(group.complete_at for group in groups)
        if len(groups) * width < plan.call_size and self._sampling and waited_s < plan.call_wait_s:
            return []
        return groups[: max(1, plan.call_size // width)]

    def _tell_returned(self, groups: Sequence[_Group], call: "Future[Scores]") -> None:
        self._events.put(partial(self._returned, groups, call))

    def _returned(self, groups: Sequence[_Group], call: "Future[Scores]") -> None:
        """A call of the reward source has ended: its groups are kept or dropped."""
        self._num_calls -= 1
        texts, rewards = call.result()
        self._batches.mark_progress()
        width = len(self._plan.draws)
        for index, group in enumerate(groups):
            part = slice(index * width, (index + 1) * width)
            rollouts = [response.result() for response in group.responses]
            group.sampled = make_group(group.prompt, rollouts, texts[part], rewards[part], self._plan)
            found = scored_part(group.sampled, self._plan)
            group.kept = found if found is not None and self._keep(found) else None
            versions = [rollout.weight_version for rollout in group.sampled.rollouts if rollout.is_sampled]
            oldest = min(versions, default=self._stream.version)
            if self._stream.complete(group.asked.number, keep=group.kept is not None, version=oldest):
                if group.kept is None:
                    self._dropped.append(group)
                else:
                    self._scored[group.asked.number] = group

    def _expire(self) -> None:
        """Give up groups that have become too old; the stream asks for their rows again."""
        expired = self._stream.expire()
        self._abort(expired)
        for number in expired:
            for groups in (self._sampling, self._unscored, self._scored):
                groups.pop(number, None)
        self._num_expired += len(expired)

    def _abort(self, numbers: Sequence[int]) -> None:
        groups = [self._sampling[number] for number in numbers if number in self._sampling]
        if groups:
            self._sampler.abort([request.id for group in groups for request in group.requests])

    def _form(self) -> GroupBatch | None:
        """The next step's batch, if its groups are complete."""
        batch = self._stream.form_batch()
        if batch is not None:
            self._hold_engines(False)
            return self._make_batch(batch)
        if self._stream.is_exhausted:
            raise self._nothing_kept()
        return None

    def _make_batch(self, batch: Batch) -> GroupBatch:
        groups = [self._scored.pop(number) for number in batch.numbers]
        sampled = sorted([*groups, *self._dropped], key=lambda group: group.asked.row)
        on_their_way_s = sum(time.monotonic() - group.asked_at for group in groups) / len(groups)
        metrics = {
            "rollout/under_way": float(self._stream.under_way),
            "rollout/waiting": float(self._stream.waiting),
            "rollout/expired": float(self._num_expired),
            "throughput/group_seconds": on_their_way_s,
            "throughput/overlap_seconds": self._overlap.take(),
        }
        self._dropped, self._num_expired = [], 0
        for step in [step for step in self._seen if step <= batch.step]:
            del self._seen[step]
        return GroupBatch(
            groups=tuple(group.kept for group in groups if group.kept is not None),
            position=batch.position,
            ahead=batch.ahead,
            metrics=metrics | describe_sampled([g.sampled for g in sampled if g.sampled is not None], len(groups)),
            seconds={name: clock.take() for name, clock in self._clocks.items()},
        )

    def _nothing_kept(self) -> RewardError:
        sampled = [group.sampled for group in self._dropped if group.sampled is not None]
        step = self._dropped[-1].asked.step
        if not any(reward.is_scored for group in sampled for reward in group.rewards):
            return RewardError(
                f"reward: None for every response of the {len(sampled)} groups sampled for step {step}: there is "
                "nothing to learn from."
            )
        return RewardError(
            f"rollout: none of the {len(sampled)} groups sampled for step {step} is worth training on: the "
            "responses to each prompt all got the same reward. Use harder or easier prompts, or another reward"
        )

    def _hold_engines(self, hold: bool) -> None:
        """Keep sleeping engines awake, or let them sleep."""
        if hold and not self._is_awake:
            self._awake.enter_context(self._sampler.awake())
        elif not hold and self._is_awake:
            self._awake.close()
        self._is_awake = hold
