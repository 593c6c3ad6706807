"""The rules of the stream of groups, over random schedules without time."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.errors import RlhfError
from rlhf.orchestrator.step.stream import Asked, Batch, GroupStream, StreamLimits

NUM_STEPS = 12


@dataclass
class Schedule:
    """A stream, and everything that may happen to it, in an order that hypothesis draws."""

    limits: StreamLimits
    stream: GroupStream = field(init=False)
    asked: dict[int, Asked] = field(default_factory=dict)
    version_of: dict[int, int] = field(default_factory=dict)
    batches: list[Batch] = field(default_factory=list)
    kept_rows: dict[int, int] = field(default_factory=dict)
    """Number -> row of the groups that no batch has yet."""
    learned: list[int] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    taken: int = 0

    def __post_init__(self) -> None:
        self.stream = GroupStream(self.limits, first_step=1, last_step=NUM_STEPS)

    def advance(self) -> None:
        """What the source does after each event."""
        self.expire()
        while (batch := self.stream.form_batch()) is not None:
            self.form(batch)
            self.expire()
        for one in self.stream.ask():
            assert one.row not in self.learned
            assert one.row not in {other.row for other in self.asked.values()} | set(self.kept_rows.values())
            self.asked[one.number] = one
            self.version_of[one.number] = self.stream.version
        on_their_way = len(self.asked) + len(self.kept_rows) + sum(len(b.numbers) for b in self.batches[self.taken :])
        assert on_their_way <= self.limits.capacity

    def expire(self) -> None:
        for number in self.stream.expire():
            assert self.asked.pop(number, None) is not None or self.kept_rows.pop(number, None) is not None

    def form(self, batch: Batch) -> None:
        assert batch.step == len(self.batches) + 1
        rows = [self.kept_rows.pop(number) for number in batch.numbers]
        assert rows == sorted(rows)
        for number in batch.numbers:
            assert 0 <= batch.step - 1 - self.version_of[number] <= self.limits.max_lag, "too old"
        if self.limits.order == "fifo" and not self.limits.extra:
            assert all(one.row > rows[-1] for one in self.asked.values()), "another came first"
        self.learned += rows
        used = {*self.learned, *self.dropped}
        assert batch.position not in used
        assert used == {*range(batch.position), *batch.ahead}
        self.batches.append(batch)

    def complete(self, number: int, keep: bool, version: int = 0) -> None:
        """`version` is that of the oldest tokens to learn from, where that counts."""
        one = self.asked.pop(number)
        if self.limits.counts_newest:
            self.version_of[number] = max(self.version_of[number], min(version, self.stream.version))
        assert self.stream.complete(number, keep=keep, version=self.version_of[number])
        if keep:
            self.kept_rows[number] = one.row
        else:
            self.dropped.append(one.row)

    @property
    def is_training(self) -> bool:
        """Whether the trainer has a batch."""
        return self.taken < len(self.batches)


limits = st.builds(
    StreamLimits,
    batch_size=st.integers(1, 4),
    max_lag=st.integers(0, 3),
    order=st.sampled_from(["fifo", "ready"]),
    extra=st.integers(0, 3),
    max_rounds=st.integers(1, 4),
    finish_partial=st.booleans(),
    counts_newest=st.booleans(),
)


@settings(max_examples=400, deadline=None)
@given(limits=limits, data=st.data())
def test_no_group_is_learned_from_twice_or_lost_or_too_old_and_nothing_stands_still(
    limits: StreamLimits, data: st.DataObject
) -> None:
    """Any order of completed and dropped groups and of finished steps ends with all steps made."""
    schedule = Schedule(replace(limits, extra=limits.extra if limits.order == "ready" else 0))
    schedule.advance()
    drops = 0
    while len(schedule.batches) < NUM_STEPS or schedule.is_training:
        if schedule.stream.is_exhausted:
            assert drops >= limits.batch_size * limits.max_rounds
            return
        choices = [("complete", number) for number in schedule.asked]
        choices += [("release", 0)] if schedule.is_training else []
        assert choices, "deadlock: nothing is under way, and the trainer has no batch"
        what, number = data.draw(st.sampled_from(choices))
        if what == "release":
            schedule.stream.release()
            schedule.taken += 1
        else:
            keep = data.draw(st.integers(0, 3)) > 0
            drops += not keep
            schedule.complete(number, keep, data.draw(st.integers(0, NUM_STEPS)))
        schedule.advance()
    assert len(schedule.learned) == len(set(schedule.learned))
    full = [len(batch.numbers) == limits.batch_size for batch in schedule.batches]
    assert all(full) or drops


@settings(max_examples=200, deadline=None)
@given(limits=limits, data=st.data())
def test_a_stream_that_goes_on_from_a_checkpoint_uses_every_row_once(limits: StreamLimits, data: st.DataObject) -> None:
    """What was under way at the checkpoint comes again, in order; what was learned from does not."""
    schedule = Schedule(replace(limits, order="ready", max_rounds=10))
    schedule.advance()
    stop_at = data.draw(st.integers(1, NUM_STEPS - 1))
    while len(schedule.batches) < stop_at or schedule.is_training:
        choices = [("complete", number) for number in schedule.asked]
        choices += [("release", 0)] if schedule.is_training else []
        what, number = data.draw(st.sampled_from(choices))
        if what == "release":
            schedule.stream.release()
            schedule.taken += 1
            if schedule.taken == stop_at:
                break
        else:
            schedule.complete(number, keep=True)
        schedule.advance()
    saved = schedule.batches[stop_at - 1]
    learned = sorted(schedule.learned[: stop_at * limits.batch_size])
    again = GroupStream(
        schedule.limits,
        first_step=stop_at + 1,
        last_step=NUM_STEPS,
        position=saved.position,
        ahead=saved.ahead,
    )
    rows = [one.row for one in again.ask()]
    assert rows == sorted(rows)
    assert not set(rows) & set(learned)
    assert sorted({*learned, *rows}) == list(range(len(learned) + len(rows))), "a row was skipped"


def completed(stream: GroupStream, asked: list[Asked], *numbers: int) -> None:
    for number in numbers:
        one = next(one for one in asked if one.number == number)
        stream.complete(one.number, keep=True, version=stream.version)


def test_the_example_in_the_docstring_is_true() -> None:
    stream = GroupStream(StreamLimits(batch_size=1, max_lag=1), first_step=1, last_step=9)
    asked = stream.ask()
    assert [one.number for one in asked] == [0, 1]
    completed(stream, asked, 0)
    assert stream.form_batch() == Batch(step=1, numbers=(0,), position=1, ahead=())
    assert stream.ask() == []
    stream.release()
    (third,) = stream.ask()
    assert (third.number, third.step) == (2, 3)
    completed(stream, asked, 1)
    assert stream.form_batch() == Batch(step=2, numbers=(1,), position=2, ahead=())


def test_what_is_ready_first_is_learned_from_first_and_a_checkpoint_says_which_rows_it_used() -> None:
    stream = GroupStream(StreamLimits(batch_size=2, max_lag=1, order="ready"), first_step=1, last_step=9)
    asked = stream.ask()
    completed(stream, asked, 3, 1)
    assert stream.form_batch() == Batch(step=1, numbers=(1, 3), position=0, ahead=(1, 3))
    completed(stream, asked, 0, 2)
    assert stream.form_batch() == Batch(step=2, numbers=(0, 2), position=4, ahead=())


def test_a_group_that_is_too_old_for_every_step_to_come_is_asked_for_again_first() -> None:
    stream = GroupStream(StreamLimits(batch_size=1, max_lag=1, order="ready"), first_step=1, last_step=9)
    slow, _ = asked = stream.ask()
    completed(stream, asked, 1)
    assert stream.form_batch() is not None
    assert stream.expire() == []  # step 2 may still learn from it
    stream.release()
    (third,) = asked = stream.ask()
    completed(stream, asked, third.number)
    assert stream.form_batch() is not None  # step 2; step 3 must not learn from version 0
    assert stream.expire() == [slow.number]
    (again,) = stream.ask()
    assert (again.row, again.step) == (slow.row, 3)
    assert again.number != slow.number
    assert not stream.complete(slow.number, keep=True, version=0), "it is known no more"


def test_with_more_groups_than_a_step_needs_the_last_ones_are_given_up_and_come_again() -> None:
    stream = GroupStream(StreamLimits(batch_size=2, order="ready", extra=1), first_step=1, last_step=9)
    asked = stream.ask()
    assert len(asked) == 3
    completed(stream, asked, 2, 0)
    assert stream.form_batch() == Batch(step=1, numbers=(0, 2), position=1, ahead=(2,))
    assert stream.expire() == [1]
    assert stream.ask() == []  # not before the new weights are live
    stream.release()
    assert [one.row for one in stream.ask()] == [1, 3, 4]


def test_without_partial_responses_new_weights_begin_them_again() -> None:
    stream = GroupStream(StreamLimits(batch_size=1, max_lag=2, finish_partial=False), first_step=1, last_step=9)
    asked = stream.ask()
    completed(stream, asked, 0)
    assert stream.form_batch() is not None
    assert stream.expire() == []
    stream.release()
    assert stream.expire() == [1, 2]
    assert [one.row for one in stream.ask()] == [1, 2, 3]


def test_where_older_tokens_are_masked_nothing_under_way_becomes_too_old() -> None:
    limits = StreamLimits(batch_size=1, max_lag=1, order="ready", counts_newest=True)
    stream = GroupStream(limits, first_step=1, last_step=9)
    slow, fast = stream.ask()
    for step in range(1, 5):
        stream.complete(fast.number, keep=True, version=stream.version)
        assert stream.expire() == []
        batch = stream.form_batch()
        assert batch is not None
        assert batch.numbers == (fast.number,)
        stream.release()
        assert stream.expire() == [], step
        (fast,) = stream.ask()
    stream.complete(slow.number, keep=True, version=3)  # its first response ended under version 3
    assert stream.expire() == []
    batch = stream.form_batch()
    assert batch is not None
    assert (batch.step, batch.numbers) == (5, (slow.number,))
    stream.release()
    late, *_ = stream.ask()
    stream.complete(late.number, keep=True, version=stream.version)
    assert stream.form_batch() is not None


def test_a_group_whose_first_response_is_too_old_when_its_last_one_ends_is_asked_for_again() -> None:
    limits = StreamLimits(batch_size=1, max_lag=1, order="ready", counts_newest=True)
    stream = GroupStream(limits, first_step=1, last_step=9)
    slow, fast = stream.ask()
    for _ in range(3):
        stream.complete(fast.number, keep=True, version=stream.version)
        stream.expire()
        assert stream.form_batch() is not None
        stream.release()
        stream.expire()
        (fast,) = stream.ask()
    stream.complete(slow.number, keep=True, version=0)
    assert stream.expire() == [slow.number]
    assert [one.row for one in stream.ask()] == [slow.row]


def test_a_response_of_older_weights_than_were_live_is_an_error() -> None:
    stream = GroupStream(StreamLimits(batch_size=1), first_step=4, last_step=9)
    (one,) = stream.ask()
    with pytest.raises(RlhfError, match="weights of version 2, when version 3 was live"):
        stream.complete(one.number, keep=True, version=2)
