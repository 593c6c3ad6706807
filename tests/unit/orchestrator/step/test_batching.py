"""Plans are whole, balanced and within limits; packing and unpacking are inverses; denominators are global."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.orchestrator.step.batching import (
    PADDING,
    BatchPlan,
    MicroBatchLimits,
    build_batches,
    merge_plans,
    pack_tokens,
    plan_batches,
    split_minibatches,
    unpack_scores,
    unpack_tokens,
)
from rlhf.types import BoolArray, Example, Experience, LearnedSequence, PackedTokens, Signal, TokenSequence


def example(*lengths: int, start: int = 0) -> Example:
    sequences = tuple(
        TokenSequence(token_ids=np.arange(start, start + n), loss_mask=np.arange(n) > n // 2) for n in lengths
    )
    return Example(id=str(start), sequences=sequences, rewards=tuple(0.0 for _ in lengths))


def experience(*lengths: int, value: float = 0.0, margins: tuple[float, ...] = ()) -> Experience:
    sequences = tuple(
        LearnedSequence(
            token_ids=np.arange(n),
            loss_mask=np.arange(n) > n // 2,
            signals={Signal.ADVANTAGES: np.full(n, value, dtype=np.float32)},
        )
        for n in lengths
    )
    return Experience(id="e", sequences=sequences, targets=tuple(range(len(lengths))), margins=margins)


shapes = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=4), max_size=30)
limits = st.builds(
    MicroBatchLimits,
    num_ranks=st.integers(1, 5),
    max_tokens_per_micro_batch=st.integers(1, 200),
    micro_batch_size=st.none() | st.integers(1, 4),
)


@given(shapes, limits)
@settings(deadline=None)
def test_every_example_runs_once_within_the_limits_and_ranks_run_equally_many(
    lengths: list[list[int]], limits: MicroBatchLimits
) -> None:
    examples = [example(*ns, start=1000 * i) for i, ns in enumerate(lengths)]
    plan = plan_batches(examples, limits)
    assert plan.indices == tuple(range(len(examples)))
    assert len(plan.micro_batches) % limits.num_ranks == 0
    for members in plan.micro_batches:
        assert len(members) == 1 or sum(sum(lengths[i]) for i in members) <= limits.max_tokens_per_micro_batch
        assert limits.micro_batch_size is None or len(members) <= limits.micro_batch_size
    assert plan == plan_batches(examples, limits)


def asked(packed: PackedTokens) -> BoolArray:
    return np.ones_like(packed.token_ids, dtype=np.bool_) if packed.wanted is None else packed.wanted


@given(shapes, limits)
@settings(deadline=None)
def test_unpacking_gives_each_sequence_its_own(lengths: list[list[int]], limits: MicroBatchLimits) -> None:
    examples = [example(*ns, start=1000 * i) for i, ns in enumerate(lengths)]
    plan = plan_batches(examples, limits)
    packed = pack_tokens(plan, examples)
    unpacked = unpack_tokens(plan, examples, [p.token_ids.astype(np.float32) for p in packed])
    assert list(unpacked) == list(range(len(examples)))
    for i, arrays in unpacked.items():
        for sequence, array in zip(examples[i].sequences, arrays, strict=True):
            np.testing.assert_array_equal(sequence.token_ids, array)
    wanted = unpack_tokens(plan, examples, [(p.token_ids * asked(p)).astype(np.float32) for p in packed])
    for i, arrays in wanted.items():
        for sequence, array in zip(examples[i].sequences, arrays, strict=True):
            np.testing.assert_array_equal(sequence.token_ids * sequence.loss_mask, array)
    scores = unpack_scores(plan, examples, [p.lengths.astype(np.float32) for p in packed])
    assert scores == {i: tuple(map(float, ns)) for i, ns in enumerate(lengths)}


@given(st.lists(st.integers(1, 100), min_size=8, max_size=40), st.integers(1, 4))
@settings(deadline=None)
def test_ranks_share_the_tokens_evenly(lengths: list[int], num_ranks: int) -> None:
    plan = plan_batches(
        [example(n) for n in lengths], MicroBatchLimits(num_ranks=num_ranks, max_tokens_per_micro_batch=100)
    )
    loads = _loads(plan, lengths)
    assert max(loads) - min(loads) <= max(lengths)


@pytest.mark.parametrize(
    ("lengths", "limits", "expected"),
    [
        ([10] * 7, MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=30), [30, 20, 20]),  # first fit: 30, 30, 10
        ([10] * 9, MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=1000, micro_batch_size=4), [30, 30, 30]),
        ([6, 5, 5, 4], MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=10), [10, 10]),
        (
            [5, 5, 4, 3, 3],
            MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=10),
            [10, 10],
        ),  # the emptiest would need a third
        ([50, 10], MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=30), [50, 10]),
        ([10] * 10, MicroBatchLimits(num_ranks=2, max_tokens_per_micro_batch=40), [30, 20, 30, 20]),
    ],
)
def test_micro_batches_are_few_and_equal(lengths: list[int], limits: MicroBatchLimits, expected: list[int]) -> None:
    plan = plan_batches([example(n) for n in lengths], limits)
    assert [sum(lengths[i] for i in members) for members in plan.micro_batches] == expected


def plan_by_definition(sizes: list[int], limits: MicroBatchLimits) -> tuple[tuple[int, ...], ...]:
    """The docstring of `plan_batches`, one example after the other, by looking at every rank and every micro-batch."""
    most, fullest = limits.max_tokens_per_micro_batch, limits.micro_batch_size or len(sizes)
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    shares: list[list[int]] = [[] for _ in range(limits.num_ranks)]

    def load(members: list[int]) -> int:
        return sum(sizes[i] for i in members)

    for i in order:
        min(shares, key=load).append(i)
    ranks = []
    for share in shares:
        few: list[list[int]] = []
        for i in share:
            fitting = [one for one in few if len(one) < fullest and load(one) + sizes[i] <= most]
            if fitting:
                fitting[0].append(i)
            else:
                few.append([i])
        equal: list[list[int]] = [[] for _ in few]
        for i in share:
            min((one for one in equal if len(one) < fullest), key=load).append(i)
        fits = all(len(one) == 1 or load(one) <= most for one in equal)
        ranks.append([tuple(sorted(one)) for one in sorted(equal if fits else few, key=load, reverse=True)])
    num_passes = max(1, *map(len, ranks)) if sizes else 0
    return tuple(itertools.chain.from_iterable([*rank, *[()] * (num_passes - len(rank))] for rank in ranks))


@given(st.lists(st.integers(1, 50), max_size=60), limits)
@settings(deadline=None)
def test_a_plan_is_its_definition(sizes: list[int], limits: MicroBatchLimits) -> None:
    assert plan_batches([example(n) for n in sizes], limits).micro_batches == plan_by_definition(sizes, limits)


def _loads(plan: BatchPlan, lengths: list[int]) -> list[int]:
    n = len(plan.micro_batches) // plan.num_ranks
    shares = [plan.micro_batches[r * n : (r + 1) * n] for r in range(plan.num_ranks)]
    return [sum(lengths[i] for members in share for i in members) for share in shares]


@pytest.mark.parametrize(("num_examples", "num_ranks"), [(1, 4), (3, 2), (5, 4)])
def test_a_tail_smaller_than_the_ranks_is_padded(num_examples: int, num_ranks: int) -> None:
    examples = [experience(6, value=1.0) for _ in range(num_examples)]
    plan = plan_batches(examples, MicroBatchLimits(num_ranks=num_ranks, max_tokens_per_micro_batch=6))
    batches = build_batches(plan, examples, "policy")
    padding = [batch for batch in batches if batch.is_padding]
    assert len(padding) == -num_examples % num_ranks
    for batch in padding:
        assert batch.tokens is PADDING
        assert not batch.loss_mask.any()
        assert len(batch.signals[Signal.ADVANTAGES]) == 1
        assert batch.denominators.examples == num_examples


def test_denominators_count_the_whole_step_and_only_it() -> None:
    experiences = [experience(4), experience(10, 1), experience(1), experience(7)]
    step, rest = (0, 1, 2), (3,)
    for num_ranks, max_tokens in [(1, 1000), (2, 1), (4, 11)]:
        limits = MicroBatchLimits(num_ranks=num_ranks, max_tokens_per_micro_batch=max_tokens)
        for batch in build_batches(plan_batches(experiences, limits, step), experiences, "policy"):
            denominators = batch.denominators
            assert (denominators.tokens, denominators.sequences, denominators.examples) == (1 + 4, 2, 3)
        (tail, *_) = build_batches(plan_batches(experiences, limits, rest), experiences, "policy")
        assert (tail.denominators.tokens, tail.denominators.examples) == (3, 1)


def test_a_batch_says_which_sequences_belong_together() -> None:
    experiences = [experience(3, 2, margins=(0.5,)), experience(1), experience(2, 2, 2, margins=(1.0, 2.0))]
    plan = BatchPlan(num_ranks=1, micro_batches=((0, 1, 2),))
    (batch,) = build_batches(plan, experiences, "reward")
    assert batch.example_index.tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.targets.tolist() == [0, 1, 0, 0, 1, 2]
    assert batch.margins.tolist() == [0, 0.5, 0, 0, 1, 2]
    assert batch.tokens.lengths.tolist() == [3, 2, 1, 2, 2, 2]
    assert batch.tokens.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 0, 1, 0, 1, 0, 1]
    assert batch.objective == "reward"
    assert batch.signals.keys() == {Signal.ADVANTAGES}


def test_experiences_of_one_step_hold_the_same_signals() -> None:
    bare = Experience(
        id="x", sequences=(LearnedSequence(token_ids=np.arange(3), loss_mask=np.ones(3, dtype=np.bool_)),)
    )
    plan = BatchPlan(num_ranks=1, micro_batches=((0, 1),))
    for order in ([bare, experience(3)], [experience(3), bare]):
        with pytest.raises(ValueError, match="the same signals"):
            build_batches(plan, order, "policy")


@given(num_examples=st.integers(1, 200), batch_size=st.integers(1, 70))
def test_no_minibatch_is_a_small_tail(num_examples: int, batch_size: int) -> None:
    sizes = [len(minibatch) for minibatch in split_minibatches(num_examples, batch_size, seed=0)]
    assert sum(sizes) == num_examples
    assert len(sizes) == -(-num_examples // batch_size)
    assert set(sizes[:-2]) <= {batch_size}
    assert max(sizes) <= batch_size
    assert len(sizes) == 1 or 2 * min(sizes) + 1 >= batch_size
    assert [len(one) for one in split_minibatches(33, 32, seed=0)] == [17, 16]


def test_measuring_and_learning_share_one_packing() -> None:
    experiences = [experience(n) for n in (5, 9, 2, 7, 7, 3, 1)]
    limits = MicroBatchLimits(num_ranks=2, max_tokens_per_micro_batch=12)
    minibatches = split_minibatches(7, 3, seed=(0, 1))
    assert sorted(itertools.chain.from_iterable(minibatches)) == list(range(7))
    assert [len(m) for m in minibatches] == [3, 2, 2]
    assert minibatches == split_minibatches(7, 3, seed=(0, 1)) != split_minibatches(7, 3, seed=(0, 2))
    plans = [plan_batches(experiences, limits, m) for m in minibatches]
    merged = merge_plans(plans)
    assert merged.indices == tuple(range(7))
    n = len(merged.micro_batches) // 2
    for rank in range(2):
        ours = merged.micro_batches[rank * n : (rank + 1) * n]
        theirs = [p.micro_batches[rank * len(p.micro_batches) // 2 :][: len(p.micro_batches) // 2] for p in plans]
        assert list(ours) == list(itertools.chain.from_iterable(theirs))


def test_outputs_of_the_wrong_length_are_refused() -> None:
    examples = [example(3), example(2)]
    plan = BatchPlan(num_ranks=1, micro_batches=((0, 1),))
    with pytest.raises(ValueError, match="5 tokens came back with 6"):
        unpack_tokens(plan, examples, [np.zeros(6, dtype=np.float32)])
    with pytest.raises(ValueError, match="2 sequences came back with 3"):
        unpack_scores(plan, examples, [np.zeros(3, dtype=np.float32)])
