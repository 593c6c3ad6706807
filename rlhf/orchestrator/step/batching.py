"""From examples to packed micro-batches and back: split, plan, pack, unpack. Pure functions on numpy.

A plan decides which examples share a forward pass. Old log-probs are computed with the plan that training uses: both
passes do the same arithmetic on the same rows, and the first ratio is exactly 1.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from heapq import heappop, heappush, heapreplace
from itertools import chain
from typing import Protocol, TypeVar

import numpy as np

from rlhf.config.run import TrainSection
from rlhf.types import (
    BoolArray,
    Denominators,
    Experience,
    ExpertArray,
    FloatArray,
    IntArray,
    LearnedSequence,
    PackedTokens,
    Signal,
    TrainBatch,
)

T = TypeVar("T")

FULL = -1
"""Tokens that fit into a micro-batch with as many examples as it may hold: no example has fewer."""
PADDING = PackedTokens(token_ids=np.zeros(1, dtype=np.int64), lengths=np.ones(1, dtype=np.int64))
"""What a rank runs when it has no example left: one token that no loss reads."""


class Tokens(Protocol):
    """A token sequence with a loss mask: a `TokenSequence` or a `LearnedSequence`."""

    @property
    def token_ids(self) -> IntArray: ...

    @property
    def loss_mask(self) -> BoolArray: ...

    @property
    def segment_starts(self) -> Sequence[int]: ...

    @property
    def routed_experts(self) -> ExpertArray | None: ...


class HasSequences(Protocol):
    """Anything with token sequences that stay together: an `Example` or an `Experience`."""

    @property
    def sequences(self) -> Sequence[Tokens]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchLimits:
    """How large a forward pass may be, and how many ranks share the work."""

    num_ranks: int
    max_tokens_per_micro_batch: int
    """Most tokens in one micro-batch; a longer example goes alone."""
    micro_batch_size: int | None = None
    """Most examples in one micro-batch; None: only tokens count."""

    @classmethod
    def of(cls, train: TrainSection, num_ranks: int) -> "MicroBatchLimits":
        """The config's limits, for a model on `num_ranks` ranks."""
        return cls(
            num_ranks=num_ranks,
            max_tokens_per_micro_batch=train.max_tokens_per_micro_batch,
            micro_batch_size=train.micro_batch_size,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """Micro-batches in rank-major order, equally many for each rank; each holds indices into a list of examples.

    With n = len(micro_batches) / num_ranks, rank r runs micro_batches[r*n:(r+1)*n]. An empty micro-batch keeps a
    rank in step with the others.
    """

    num_ranks: int
    micro_batches: tuple[tuple[int, ...], ...]

    @property
    def indices(self) -> tuple[int, ...]:
        """Every planned example, once, in rising order."""
        return tuple(sorted(chain.from_iterable(self.micro_batches)))


def next_batch_size(num_left: int, batch_size: int) -> int:
    """Size of the next batch where `num_left` items are left: the last two batches share what full ones leave over, so
    that no optimizer step rests on a handful of examples. 65 items in batches of 64 become 33 and 32:

    >>> next_batch_size(65, 64), next_batch_size(32, 64), next_batch_size(128, 64)
    (33, 32, 64)
    """
    return (num_left + 1) // 2 if batch_size < num_left < 2 * batch_size else min(num_left, batch_size)


def split_minibatches(num_examples: int, batch_size: int, seed: int | Sequence[int]) -> list[tuple[int, ...]]:
    """Deal the examples of a rollout batch into optimizer steps by a seeded permutation; the last two may be smaller
    (`next_batch_size`)."""
    order = np.random.default_rng(seed).permutation(num_examples).tolist()
    minibatches = []
    while order:
        size = next_batch_size(len(order), batch_size)
        minibatches.append(tuple(order[:size]))
        order = order[size:]
    return minibatches


def count_tokens(examples: Sequence[HasSequences]) -> list[int]:
    """Tokens of each example."""
    return [sum(len(sequence.token_ids) for sequence in example.sequences) for example in examples]


def plan_batches(
    examples: Sequence[HasSequences], limits: MicroBatchLimits, indices: Sequence[int] | None = None
) -> BatchPlan:
    """Plan the forward passes over `examples`, or over those at `indices`.

    Examples go, longest first, to the rank with the fewest tokens, and there into micro-batches as few and as equal as
    the limits allow: the largest decides the memory. A rank's fullest micro-batches come first, so that passes
    that run at the same time are of similar size. The plan depends on the lengths and the set of indices alone.
    """
    chosen = range(len(examples)) if indices is None else indices
    sizes = {i: sum(len(sequence.token_ids) for sequence in examples[i].sequences) for i in chosen}
    loads = [(0, rank) for rank in range(limits.num_ranks)]  # a heap
    shares: list[list[int]] = [[] for _ in loads]
    for i in sorted(sizes, key=lambda i: (-sizes[i], i)):
        load, rank = loads[0]
        heapreplace(loads, (load + sizes[i], rank))
        shares[rank].append(i)
    ranks = [_split(share, sizes, limits) for share in shares]
    num_passes = max(1, *(len(rank) for rank in ranks)) if sizes else 0
    padded = [[*rank, *[()] * (num_passes - len(rank))] for rank in ranks]
    return BatchPlan(num_ranks=limits.num_ranks, micro_batches=tuple(chain.from_iterable(padded)))


def _split(share: Sequence[int], sizes: Mapping[int, int], limits: MicroBatchLimits) -> list[tuple[int, ...]]:
    """A rank's examples (longest first) in micro-batches; the fullest first, each in rising order."""
    few = _first_fit(share, sizes, limits)
    bins = _equal(share, sizes, limits, len(few)) or few
    loads = [sum(sizes[i] for i in members) for members in bins]
    order = sorted(range(len(bins)), key=lambda k: (-loads[k], k))
    return [tuple(sorted(bins[k])) for k in order]


def _first_fit(share: Sequence[int], sizes: Mapping[int, int], limits: MicroBatchLimits) -> list[list[int]]:
    """Each example in the first micro-batch that has room."""
    bins: list[list[int]] = []
    room = np.full(len(share), limits.max_tokens_per_micro_batch)
    for i in share:
        fits = room[: len(bins)] >= sizes[i]
        k = int(fits.argmax()) if fits.any() else len(bins)
        if k == len(bins):
            bins.append([])
        bins[k].append(i)
        room[k] = room[k] - sizes[i] if len(bins[k]) != limits.micro_batch_size else FULL
    return bins


def _equal(
    share: Sequence[int], sizes: Mapping[int, int], limits: MicroBatchLimits, num: int
) -> list[list[int]] | None:
    """Each example in the emptiest of `num` micro-batches; None where one does not fit."""
    bins: list[list[int]] = [[] for _ in range(num)]
    loads = [(0, k) for k in range(num)]  # a heap of those that have room
    for i in share:
        load, k = heappop(loads)
        if bins[k] and load + sizes[i] > limits.max_tokens_per_micro_batch:
            return None
        bins[k].append(i)
        if len(bins[k]) != limits.micro_batch_size:
            heappush(loads, (load + sizes[i], k))
    return bins


def merge_rank_major(num_ranks: int, parts: Sequence[Sequence[T]]) -> list[T]:
    """One rank-major list from several: each rank runs its share of the first part, then of the second, ..."""
    merged: list[T] = []
    for rank in range(num_ranks):
        for part in parts:
            n = len(part) // num_ranks
            merged += part[rank * n : (rank + 1) * n]
    return merged


def merge_plans(plans: Sequence[BatchPlan]) -> BatchPlan:
    """One plan that runs the micro-batches of several (the minibatches of a rollout batch) unchanged."""
    num_ranks = plans[0].num_ranks
    micro_batches = merge_rank_major(num_ranks, [plan.micro_batches for plan in plans])
    return BatchPlan(num_ranks=num_ranks, micro_batches=tuple(micro_batches))


def pack_tokens(plan: BatchPlan, examples: Sequence[HasSequences]) -> list[PackedTokens]:
    """Each micro-batch: its examples' sequences laid end to end. `wanted` are the tokens that are learned from."""
    return [_pack([s for i in members for s in examples[i].sequences]) for members in plan.micro_batches]


def _pack(sequences: Sequence[Tokens], temperature: float | None = None) -> PackedTokens:
    if not sequences:
        return PADDING
    return PackedTokens(
        token_ids=np.concatenate([s.token_ids for s in sequences]).astype(np.int64, copy=False),
        lengths=np.array([len(s.token_ids) for s in sequences], dtype=np.int64),
        segment_lengths=_segment_lengths(sequences),
        wanted=np.concatenate([s.loss_mask for s in sequences]),
        temperature=temperature,
        routed_experts=_routed_experts(sequences),
    )


def _routed_experts(sequences: Sequence[Tokens]) -> ExpertArray | None:
    """Of all tokens of the sequences, unknown for those of sequences without; None where no sequence has them."""
    known = next((s.routed_experts for s in sequences if s.routed_experts is not None), None)
    if known is None:
        return None
    unknown = np.iinfo(known.dtype).max
    parts = [
        np.full((len(s.token_ids), *known.shape[1:]), unknown, dtype=known.dtype)
        if s.routed_experts is None
        else s.routed_experts
        for s in sequences
    ]
    if any(len(part) != len(s.token_ids) for part, s in zip(parts, sequences, strict=True)):
        raise ValueError("the routed experts of a sequence are not those of its tokens")
    return np.concatenate(parts)


def with_own_routes(tokens: PackedTokens) -> PackedTokens:
    """The same micro-batch for another model than the one whose experts are known."""
    return tokens if tokens.routed_experts is None else replace(tokens, routed_experts=None)


def _segment_lengths(sequences: Sequence[Tokens]) -> IntArray | None:
    """Of all segments of the sequences; None where each is one."""
    if not any(sequence.segment_starts for sequence in sequences):
        return None
    bounds = [[0, *sequence.segment_starts, len(sequence.token_ids)] for sequence in sequences]
    return np.concatenate([np.diff(one) for one in bounds])


def unpack_tokens(
    plan: BatchPlan, examples: Sequence[HasSequences], outputs: Sequence[FloatArray]
) -> dict[int, tuple[FloatArray, ...]]:
    """Undo `pack_tokens` for per-token outputs [T]: example index -> one array for each of its sequences."""
    arrays: dict[int, tuple[FloatArray, ...]] = {}
    for members, output in zip(plan.micro_batches, outputs, strict=True):
        start = 0
        for i in members:
            parts = []
            for sequence in examples[i].sequences:
                end = start + len(sequence.token_ids)
                parts.append(output[start:end])
                start = end
            arrays[i] = tuple(parts)
        if members and start != len(output):
            raise ValueError(f"a micro-batch of {start} tokens came back with {len(output)} values")
    return dict(sorted(arrays.items()))


def unpack_scores(
    plan: BatchPlan, examples: Sequence[HasSequences], outputs: Sequence[FloatArray]
) -> dict[int, tuple[float, ...]]:
    """Undo `pack_tokens` for per-sequence outputs [S]: example index -> one number for each of its sequences."""
    scores: dict[int, tuple[float, ...]] = {}
    for members, output in zip(plan.micro_batches, outputs, strict=True):
        start = 0
        for i in members:
            end = start + len(examples[i].sequences)
            scores[i] = tuple(output[start:end].tolist())
            start = end
        if members and start != len(output):
            raise ValueError(f"a micro-batch of {start} sequences came back with {len(output)} scores")
    return dict(sorted(scores.items()))


def count_denominators(experiences: Sequence[Experience]) -> Denominators:
    """What the losses of one optimizer step are divided by."""
    masks = [sequence.loss_mask for experience in experiences for sequence in experience.sequences]
    counts = [int(np.count_nonzero(mask)) for mask in masks]
    return Denominators(
        tokens=float(sum(counts)),
        sequences=float(len(counts) - counts.count(0)),
        examples=float(len(experiences)),
    )


def build_batches(
    plan: BatchPlan,
    experiences: Sequence[Experience],
    objective: str,
    *,
    temperature: float | None = None,
    is_first_pass: bool = False,
) -> list[TrainBatch]:
    """The micro-batches of one optimizer step. The denominators count all planned experiences of all ranks, and every
    micro-batch, padding too, holds the signals of the first of them. `temperature` is that of `PackedTokens`,
    `is_first_pass` that of `TrainBatch`.

    Prompts of 3, 1 and 1 tokens with responses of 2, 2 and 1, at most 6 tokens per micro-batch:

    >>> masks = [np.arange(n) >= start for n, start in ((5, 3), (3, 1), (2, 1))]
    >>> learned = [LearnedSequence(token_ids=np.arange(len(mask)), loss_mask=mask) for mask in masks]
    >>> experiences = [Experience(id="", sequences=(sequence,)) for sequence in learned]
    >>> plan = plan_batches(experiences, MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=6))
    >>> for batch in build_batches(plan, experiences, "policy"):
    ...     print(batch.tokens.position_ids, batch.loss_mask.sum(), batch.denominators)
    [0 1 2 3 4] 2 Denominators(tokens=5.0, sequences=3.0, examples=3.0)
    [0 1 2 0 1] 3 Denominators(tokens=5.0, sequences=3.0, examples=3.0)
    """
    planned = [experiences[i] for i in plan.indices]
    denominators = count_denominators(planned)
    batches = []
    for indices in plan.micro_batches:
        members = [experiences[i] for i in indices]
        sequences = [sequence for experience in members for sequence in experience.sequences]
        tokens = _pack(sequences, temperature)
        batches.append(
            TrainBatch(
                tokens=tokens,
                loss_mask=np.zeros(1, dtype=np.bool_) if tokens.wanted is None else tokens.wanted,
                example_index=_example_index(members),
                targets=_per_sequence([e.targets or (0.0,) * len(e.sequences) for e in members]),
                margins=_per_sequence([(0.0, *(e.margins or (0.0,) * (len(e.sequences) - 1))) for e in members]),
                denominators=denominators,
                objective=objective,
                signals=_pack_signals(sequences, expected=planned[0].sequences[0].signals.keys()),
                coefficients=planned[0].coefficients,
                is_first_pass=is_first_pass,
            )
        )
    return batches


def _pack_signals(sequences: Sequence[LearnedSequence], expected: Set[Signal]) -> dict[Signal, FloatArray]:
    """[T] for each signal; padding, a micro-batch without sequences, holds one 0."""
    if not sequences:
        return {signal: np.zeros(1, dtype=np.float32) for signal in expected}
    if any(sequence.signals.keys() != expected for sequence in sequences):
        held = sorted({", ".join(sorted(sequence.signals)) or "none" for sequence in sequences})
        raise ValueError(f"experiences of one step must hold the same signals (got {' and '.join(held)})")
    num_tokens = sum(len(sequence.token_ids) for sequence in sequences)
    packed = {
        signal: np.concatenate([sequence.signals[signal] for sequence in sequences]).astype(np.float32, copy=False)
        for signal in expected
    }
    for signal, array in packed.items():
        if len(array) != num_tokens:
            raise ValueError(f"{signal} has {len(array)} entries for {num_tokens} tokens")
    return packed


def _example_index(members: Sequence[Experience]) -> IntArray:
    """[S]: which experience a sequence belongs to; -1 in padding."""
    if not members:
        return np.full(1, -1, dtype=np.int64)
    return np.repeat(np.arange(len(members)), [len(e.sequences) for e in members])


def _per_sequence(rows: Sequence[Sequence[float]]) -> FloatArray:
    """[S] from one row of numbers per experience; padding holds 0."""
    return np.array(list(chain.from_iterable(rows)) or [0.0], dtype=np.float32)
