"""Log-probs of given answers under a frozen reference: measured once, kept on disk, and read by every later run.

What a run will ask of its reference is known before it begins, since given answers come in a seeded order. Those
sequences are measured in chunks; how a chunk is packed depends on its content alone, and its file is named by that
content. So a log-prob has the same bits in the run that measured it and in every run that reads it, and a fill that was
cut short goes on where it ended.
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
from rlhf.orchestrator.run.files import blaming, write_bytes
from rlhf.orchestrator.step.batching import PADDING, MicroBatchLimits, pack_tokens, plan_batches, unpack_tokens
from rlhf.orchestrator.step.sources import GroupSource
from rlhf.types import BoolArray, FloatArray, IntArray, PackedTokens, ScoredGroup

CHUNK_SEQUENCES = 512
PROGRESS_S = 10.0
NAME = "log_probs"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """One sequence that the reference will be asked about."""

    token_ids: IntArray

    @property
    def sequences(self) -> "tuple[Asked, ...]":
        """Itself: it is packed like an example of one sequence."""
        return (self,)

    @property
    def loss_mask(self) -> BoolArray:
        """All of it: which tokens are learned from is up to the run that reads."""
        return np.ones(len(self.token_ids), dtype=np.bool_)

    @property
    def key(self) -> bytes:
        """Stands for the token ids."""
        return blake2b(self.token_ids.astype("<i4").tobytes(), digest_size=16).digest()


def asked_of_reference(
    source: GroupSource, num_steps: int, algorithm: Algorithm, held_out: Sequence[ScoredGroup]
) -> Iterator[Asked]:
    """What a run of given answers will ask, repeats included: at each step about the sequences that `algorithm` selects
    from the step's groups, and at evaluations about those that it selects from all of `held_out`. Both must depend on
    nothing else."""
    source.start(1, num_steps, 0)
    of_steps = (source.take(step).groups for step in range(1, num_steps + 1))
    for groups in chain(of_steps, [held_out]):
        for example in algorithm.select(groups):
            yield from (Asked(sequence.token_ids) for sequence in example.sequences)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Sequences that are measured together. `name` is that of their file."""

    asked: tuple[Asked, ...]
    name: str

    @property
    def num_tokens(self) -> int:
        return sum(len(one.token_ids) for one in self.asked)


class ReferenceStore:
    """A `TokenScorer` that answers from disk, once everything is there.

    `is_complete` says whether a reference is still needed; `fill` asks it for what is missing.
    """

    num_ranks = 1

    def __init__(self, folder: Path, asked: Iterable[Asked], train: TrainSection, *, warn: Say) -> None:
        """`folder` belongs to one reference model, computing in one way. A damaged file is as good as none."""
        self.folder = folder
        self._train = train
        self._warn = warn
        self._log_probs: dict[bytes, FloatArray] = {}
        # Sorted by key, so that the same rows in another order are the same chunks. One token is predicted by nothing.
        by_key = {one.key: Asked(one.token_ids.astype(np.int32)) for one in asked if len(one.token_ids) > 1}
        ordered = [by_key[key] for key in sorted(by_key)]
        chunks = [
            self._chunk(ordered[start : start + CHUNK_SEQUENCES]) for start in range(0, len(ordered), CHUNK_SEQUENCES)
        ]
        self._missing = [chunk for chunk in chunks if not self._read(chunk)]

    @property
    def is_complete(self) -> bool:
        """Whether everything that was asked for is known."""
        return not self._missing

    def fill(self, reference: TokenScorer, *, say: Say, check: Callable[[], None]) -> None:
        """Measure what is missing, chunk by chunk, each kept at once. `check` may raise between two chunks.

        Raises NumericsError where the reference says NaN or inf; CheckpointError where the disk refuses.
        """
        total = sum(chunk.num_tokens for chunk in self._missing)
        num_sequences = sum(len(chunk.asked) for chunk in self._missing)
        say(f"reference: measuring {num_sequences} sequences ({total} tokens) once; kept in {self.folder}")
        begin = told = time.monotonic()
        done = 0
        while self._missing:
            check()
            chunk = self._missing[0]
            self._keep(chunk, self._measure(chunk, reference))
            self._missing.pop(0)
            done += chunk.num_tokens
            now = time.monotonic()
            if now - told >= PROGRESS_S:
                told = now
                say(f"reference: {done / total:.0%} measured, {(now - begin) * (total / done - 1):.0f} s left")

    def forward(self, batches: Sequence[PackedTokens]) -> list[FloatArray]:
        """See `TokenScorer.forward`: log-probs [T] of each micro-batch."""
        return [self._look_up(batch) for batch in batches]

    def _look_up(self, batch: PackedTokens) -> FloatArray:
        said = np.zeros(len(batch.token_ids), dtype=np.float32)
        start = 0
        for end in np.cumsum(batch.lengths).tolist():
            if end - start > 1:
                known = self._log_probs.get(Asked(batch.token_ids[start:end]).key)
                if known is None:
                    raise RlhfError(
                        "reference: asked about a sequence that the run's own rows did not announce. What an algorithm "
                        "selects must depend on the groups that it is given, and on nothing else"
                    )
                said[start:end] = known
            start = end
        return said

    def _chunk(self, asked: Sequence[Asked]) -> Chunk:
        """The chunk's name covers what decides the bits: the sequences, and how they are packed."""
        packing = f"{self._train.max_tokens_per_micro_batch} {self._train.micro_batch_size}".encode()
        content = sha256(b"".join([packing, *(one.key for one in asked)])).hexdigest()
        return Chunk(tuple(asked), f"{content[:40]}.safetensors")

    def _measure(self, chunk: Chunk, reference: TokenScorer) -> FloatArray:
        """The plan is that of one rank, whatever their number: its micro-batches are dealt out in turn."""
        plan = plan_batches(chunk.asked, MicroBatchLimits.of(self._train, num_ranks=1))
        batches = pack_tokens(plan, chunk.asked)
        n = reference.num_ranks
        batches += [PADDING] * (-len(batches) % n)
        dealt = [index for rank in range(n) for index in range(rank, len(batches), n)]
        said = dict(zip(dealt, reference.forward([batches[index] for index in dealt]), strict=True))
        by_sequence = unpack_tokens(plan, chunk.asked, [said[index] for index in range(len(plan.micro_batches))])
        log_probs = np.concatenate([by_sequence[index][0] for index in range(len(chunk.asked))])
        wrong = len(log_probs) - int(np.isfinite(log_probs).sum())
        if wrong:
            raise NumericsError(f"reference: {wrong} of {len(log_probs)} log-probs are not finite. Use float32")
        return log_probs.astype(np.float32, copy=False)

    def _keep(self, chunk: Chunk, log_probs: FloatArray) -> None:
        with blaming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        content = save({NAME: log_probs}, metadata={"sha256": sha256(log_probs.tobytes()).hexdigest()})
        write_bytes(self.folder / chunk.name, content)
        self._know(chunk, log_probs)

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
            self._warn(f"{path}: cannot be read ({error}); measured again")
            return False
        if log_probs.shape != (chunk.num_tokens,) or digest != sha256(log_probs.tobytes()).hexdigest():
            self._warn(f"{path}: damaged; measured again")
            return False
        self._know(chunk, log_probs)
        return True

    def _know(self, chunk: Chunk, log_probs: FloatArray) -> None:
        ends = np.cumsum([len(one.token_ids) for one in chunk.asked])
        for one, said in zip(chunk.asked, np.split(log_probs, ends[:-1]), strict=True):
            self._log_probs[one.key] = said
