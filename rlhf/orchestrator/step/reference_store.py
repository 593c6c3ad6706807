"""Log-probs of a data set's responses under a frozen reference: computed once, kept on disk, and read by later runs.

Which sequences a run needs is known before it begins, because the rows of a data set come in a seeded order. They are
computed in chunks. How a chunk is packed depends on its content alone, and its file is named by that content. So a
log-prob has the same bits in the run that computed it and in every run that reads it, and an interrupted fill continues
where it ended.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from itertools import chain
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from rlhf.algorithms.base import Algorithm
from rlhf.config.run import TrainSection
from rlhf.engines.base import TokenScorer
from rlhf.errors import NumericsError, RlhfError
from rlhf.orchestrator.run.files import checkpoint_errors, write_bytes
from rlhf.orchestrator.step.batching import PADDING, MicroBatchLimits, pack_tokens, plan_batches, unpack_tokens
from rlhf.orchestrator.step.sources import GroupSource
from rlhf.repair import Repair, Repaired, RepairKind
from rlhf.types import BoolArray, FloatArray, IntArray, PackedTokens, ScoredGroup

CHUNK_SEQUENCES = 512
PROGRESS_S = 10.0
NAME = "log_probs"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ReferenceSequence:
    """One sequence whose log-probs under the reference are needed."""

    token_ids: IntArray

    @property
    def sequences(self) -> "tuple[ReferenceSequence, ...]":
        """Itself: it is packed as an example of one sequence."""
        return (self,)

    @property
    def loss_mask(self) -> BoolArray:
        """All of it: which tokens are learned from depends on the run that reads."""
        return np.ones(len(self.token_ids), dtype=np.bool_)

    @property
    def segment_starts(self) -> tuple[int, ...]:
        """Responses of data sets have one segment."""
        return ()

    @property
    def routed_experts(self) -> None:
        """A reference chooses for itself."""

    @property
    def key(self) -> bytes:
        """A digest of the token ids."""
        return blake2b(self.token_ids.astype("<i4").tobytes(), digest_size=16).digest()


def reference_sequences(
    source: GroupSource,
    num_steps: int,
    algorithm: Algorithm,
    held_out: Sequence[ScoredGroup],
    resumed: tuple[int, int] | None = None,
) -> Iterator[ReferenceSequence]:
    """The sequences that an offline run needs, repeats included: at each step those that `algorithm` selects from the
    step's groups, and at evaluations those that it selects from all of `held_out`. The selection must depend on nothing
    else.

    `resumed` is the next step of a run that continues, and the row where it reads on. These rows are needed as well:
    with another batch size than before they are not those of the same steps from the start. All the others are still
    announced, so that what is stored is named as before.
    """
    starts = [(1, 0)] if resumed is None else [(1, 0), resumed]
    for groups in chain(*(_groups_from(source, *start, num_steps) for start in starts), [held_out]):
        for example in algorithm.select(groups):
            yield from (ReferenceSequence(sequence.token_ids) for sequence in example.sequences)


def _groups_from(
    source: GroupSource, first_step: int, position: int, num_steps: int
) -> Iterator[Sequence[ScoredGroup]]:
    source.start(first_step, num_steps, position)
    for step in range(first_step, num_steps + 1):
        yield source.take(step).groups


@dataclass(frozen=True, slots=True)
class Chunk:
    """Sequences that are computed together. `name` is that of their file."""

    sequences: tuple[ReferenceSequence, ...]
    name: str

    @property
    def num_tokens(self) -> int:
        return sum(len(one.token_ids) for one in self.sequences)


class ReferenceStore:
    """A `TokenScorer` that reads log-probs from disk, once all of them are there.

    Until `is_complete`, a reference model is needed: `fill` computes what is missing with it.
    """

    num_ranks = 1

    def __init__(
        self, folder: Path, sequences: Iterable[ReferenceSequence], train: TrainSection, *, repaired: Repaired
    ) -> None:
        """`folder` is for one reference model in one precision and on one kind of device. A damaged file counts as
        missing."""
        self.folder = folder
        self._train = train
        self._repaired = repaired
        self._log_probs: dict[bytes, FloatArray] = {}
        # Sorted by key, so that the same rows in another order are the same chunks. One token is predicted by nothing.
        by_key = {
            one.key: ReferenceSequence(one.token_ids.astype(np.int32)) for one in sequences if len(one.token_ids) > 1
        }
        ordered = [by_key[key] for key in sorted(by_key)]
        chunks = [
            self._chunk(ordered[start : start + CHUNK_SEQUENCES]) for start in range(0, len(ordered), CHUNK_SEQUENCES)
        ]
        self._missing = [chunk for chunk in chunks if not self._read(chunk)]

    @property
    def is_complete(self) -> bool:
        """Whether all log-probs are known."""
        return not self._missing

    def fill(self, reference: TokenScorer, *, say: Say, check: Callable[[], None]) -> None:
        """Compute what is missing, chunk by chunk, each written at once. `check` may raise between two chunks.

        Raises NumericsError where the reference returns NaN or inf; CheckpointError where the disk refuses.
        """
        total = sum(chunk.num_tokens for chunk in self._missing)
        num_sequences = sum(len(chunk.sequences) for chunk in self._missing)
        say(f"reference: computing {num_sequences} sequences ({total} tokens) once; kept in {self.folder}")
        begin = reported = time.monotonic()
        done = 0
        while self._missing:
            check()
            chunk = self._missing[0]
            self._keep(chunk, self._compute(chunk, reference))
            self._missing.pop(0)
            done += chunk.num_tokens
            now = time.monotonic()
            if now - reported >= PROGRESS_S:
                reported = now
                say(f"reference: {done / total:.0%} done, {(now - begin) * (total / done - 1):.0f} s left")

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        """See `TokenScorer.forward`: log-probs [T] of each micro-batch."""
        return [self._read_batch(batch) for batch in batches]

    def _read_batch(self, batch: PackedTokens) -> FloatArray:
        log_probs = np.zeros(len(batch.token_ids), dtype=np.float32)
        start = 0
        for end in np.cumsum(batch.lengths).tolist():
            if end - start > 1:
                known = self._log_probs.get(ReferenceSequence(batch.token_ids[start:end]).key)
                if known is None:
                    raise RlhfError(
                        "reference: a sequence is needed that the run's own rows did not announce. What an algorithm "
                        "selects must depend on the groups that it is given, and on nothing else"
                    )
                log_probs[start:end] = known
            start = end
        return log_probs

    def _chunk(self, sequences: Sequence[ReferenceSequence]) -> Chunk:
        """The chunk's name covers what decides the bits: the sequences, and how they are packed."""
        packing = f"{self._train.max_tokens_per_micro_batch} {self._train.micro_batch_size}".encode()
        content = sha256(b"".join([packing, *(one.key for one in sequences)])).hexdigest()
        return Chunk(tuple(sequences), f"{content[:40]}.safetensors")

    def _compute(self, chunk: Chunk, reference: TokenScorer) -> FloatArray:
        """Log-probs of a chunk. The plan is for one rank, whatever their number; its micro-batches go to the ranks in
        turn."""
        plan = plan_batches(chunk.sequences, MicroBatchLimits.of(self._train, num_ranks=1))
        batches = pack_tokens(plan, chunk.sequences)
        n = reference.num_ranks
        batches += [PADDING] * (-len(batches) % n)
        dealt = [index for rank in range(n) for index in range(rank, len(batches), n)]
        outputs = dict(zip(dealt, reference.forward([batches[index] for index in dealt]), strict=True))
        by_sequence = unpack_tokens(plan, chunk.sequences, [outputs[index] for index in range(len(plan.micro_batches))])
        log_probs = np.concatenate([by_sequence[index][0] for index in range(len(chunk.sequences))])
        wrong = len(log_probs) - int(np.isfinite(log_probs).sum())
        if wrong:
            raise NumericsError(f"reference: {wrong} of {len(log_probs)} log-probs are not finite. Use float32")
        return log_probs.astype(np.float32, copy=False)

    def _keep(self, chunk: Chunk, log_probs: FloatArray) -> None:
        with checkpoint_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        content = save({NAME: log_probs}, metadata={"sha256": sha256(log_probs.tobytes()).hexdigest()})
        write_bytes(self.folder / chunk.name, content)
        self._remember(chunk, log_probs)

    def _read(self, chunk: Chunk) -> bool:
        """Take a chunk's log-probs from its file. False where it is not there, or damaged."""
        path = self.folder / chunk.name
        if not path.exists():
            return False
        try:
            with safe_open(path, framework="numpy") as file:
                log_probs: FloatArray = file.get_tensor(NAME)
                digest = (file.metadata() or {}).get("sha256")
        except (OSError, SafetensorError) as error:
            self._tell(path, f"cannot be read ({error})")
            return False
        if log_probs.shape != (chunk.num_tokens,) or digest != sha256(log_probs.tobytes()).hexdigest():
            self._tell(path, "damaged")
            return False
        self._remember(chunk, log_probs)
        return True

    def _tell(self, path: Path, what: str) -> None:
        text = f"{path}: {what}; computed again"
        self._repaired(Repair(kind=RepairKind.STORE, where=str(self.folder), text=text))

    def _remember(self, chunk: Chunk, log_probs: FloatArray) -> None:
        ends = np.cumsum([len(one.token_ids) for one in chunk.sequences])
        for one, array in zip(chunk.sequences, np.split(log_probs, ends[:-1]), strict=True):
            self._log_probs[one.key] = array
