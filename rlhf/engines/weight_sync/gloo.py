"""Weights through a gloo group of their own: trainer rank 0 and every receiving process. For CPU; needs no vLLM.

A bucket is one broadcast of one flat buffer, which carries its own digest. Three things overlap on the sender: the
gather of the next bucket, the digest of this one, the broadcast of the one before.

The group lives on a store of its own beside the trainer's default group. A time-out breaks it for good (gloo closes
its connections); a refused bucket does not, since every receiver takes part to the end before it complains.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist

from rlhf.engines.weight_sync.base import LOOKING_S, EngineClient
from rlhf.engines.weight_sync.buckets import (
    DIGEST_BYTES,
    Bucket,
    dtype_of,
    from_info,
    is_sealed,
    plan_buckets,
    seal,
    to_info,
    whole_digest,
)
from rlhf.engines.weight_sync.gloo_group import (
    BufferPool,
    GlooGroup,
    GlooInitInfo,
    GlooUpdateInfo,
    connect,
    joined_key,
    listen,
    progress_key,
)
from rlhf.engines.weight_sync.source import Gather, WeightSource
from rlhf.errors import WeightSyncError
from rlhf.types import SyncReport

CALLS_PER_SYNC = 3
"""start, update, finish: to each engine, whatever the number of parameters or buckets."""
CLIENT_MARGIN_S = 1.0


class GlooReceiver:
    """One receiving process's end of the group."""

    def __init__(self, info: GlooInitInfo, local_rank: int = 0) -> None:
        """Join the group. Raises WeightSyncError when the trainer or another engine does not come in time."""
        self.engine = info.engine
        self._rank = info.rank_offset + local_rank
        self._timeout = timedelta(seconds=info.timeout_s)
        self._pool = BufferPool(0)
        try:
            self._store = connect(info)
            self._store.set(joined_key(self._rank), self.engine)
            self._group = GlooGroup(self._store, self._rank, info.world_size, info.timeout_s)
        except RuntimeError as error:
            raise WeightSyncError(f"engine {self.engine}: cannot join the weight transfer group: {error}") from error

    def receive(self, info: GlooUpdateInfo, load: Callable[[Iterable[tuple[str, torch.Tensor]]], object]) -> str:
        """Receive one version and `load` each bucket that arrived as it was sent; returns the digest of the whole.

        `load` may keep the tensors: their memory is not used again until it lets go of them. Raises WeightSyncError
        that names engine, version and bucket.
        """
        dtype, buckets = dtype_of(info.dtype), from_info(info.buckets)
        largest = max(bucket.wire_bytes(dtype) for bucket in buckets)
        if largest != self._pool.nbytes:
            self._pool = BufferPool(largest)
        digests: list[bytes] = []
        problem: WeightSyncError | None = None
        arriving = self._expect(buckets[0], dtype)
        for index, bucket in enumerate(buckets):
            buffer, work = arriving
            if index + 1 < len(buckets):
                arriving = self._expect(buckets[index + 1], dtype)
            where = f"engine {self.engine}: version {info.version}: bucket {index + 1} of {len(buckets)}"
            try:
                work.wait(self._timeout)
            except RuntimeError as error:
                raise WeightSyncError(f"{where} did not arrive: {error}") from error
            digest, whole = is_sealed(buffer)
            digests.append(digest)
            self._store.set(progress_key(info.version, self._rank), str(index + 1))
            if not whole:
                names = f"{bucket.parameters[0].name} to {bucket.parameters[-1].name}"
                problem = problem or WeightSyncError(f"{where} ({names}) is not what was sent: its digest differs")
            if problem is None:
                try:
                    load(bucket.views(buffer[:-DIGEST_BYTES].view(dtype)))
                except Exception as error:
                    problem = WeightSyncError(f"{where} cannot be loaded: {error!r}")
        if problem is not None:
            raise problem
        return whole_digest(dtype, buckets, digests)

    def close(self) -> None:
        """Leave the group."""
        self._group.close()

    def _expect(self, bucket: Bucket, dtype: torch.dtype) -> tuple[torch.Tensor, dist.Work]:
        buffer = self._pool.take(bucket.wire_bytes(dtype))
        return buffer, self._group.broadcast(buffer)


class GlooSender:
    """Trainer rank 0: gathers, seals and broadcasts. Produces buckets, waits for the receivers' joining and answers."""

    def __init__(
        self,
        source: WeightSource,
        client: EngineClient,
        *,
        master_address: str,
        port: int,
        num_receivers: int,
        bucket_bytes: int,
        timeout_s: float,
    ) -> None:
        self._source = source
        self._client = client
        self._timeout_s = timeout_s
        self._buckets = plan_buckets(source.specs(), source.dtype, bucket_bytes)
        size = max(bucket.wire_bytes(source.dtype) for bucket in self._buckets)
        self._buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(min(2, len(self._buckets)))]
        self._ranks_per_engine = num_receivers // len(client.engine_names)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="weight-sync")
        self._broken = False
        self._store = listen(master_address, port, timeout_s)
        self._group = self._join(master_address)

    def send(self, version: int) -> SyncReport:
        """See `WeightSender.send`."""
        if self._broken:
            raise WeightSyncError(f"version {version}: the weight transfer group is broken. Build a new sender.")
        start = time.monotonic()
        outbox = _Outbox(self._timeout_s)
        answer = self._announce(version, outbox)
        digests = []
        gather = self._gather(0)
        for index in range(len(self._buckets)):
            gather.wait(self._timeout_s)
            buffer = self._buffer(index)
            digests.append(seal(buffer))
            outbox.wait()
            # Whatever becomes of the engines, the other ranks of the trainer must get rid of their shards.
            if index + 1 < len(self._buckets):
                gather = self._gather(index + 1)
            if outbox.failure is None:
                outbox.work = self._broadcast(buffer)
        outbox.wait()
        digest = whole_digest(self._source.dtype, self._buckets, digests)
        self._conclude(version, digest, answer, outbox.failure)
        return SyncReport(
            version=version,
            digest=digest,
            num_bytes=sum(bucket.numel for bucket in self._buckets) * self._source.dtype.itemsize,
            seconds=time.monotonic() - start,
            num_buckets=len(self._buckets),
            num_remote_calls=CALLS_PER_SYNC * len(self._client.engine_names),
        )

    def close(self) -> None:
        """See `WeightSender.close`."""
        self._threads.shutdown(wait=False)
        self._group.close()

    def _announce(self, version: int, outbox: "_Outbox") -> Future[None] | None:
        """Stop the engines and have them receive; where one refuses to: None, and the failure in the outbox."""
        dtype = str(self._source.dtype).removeprefix("torch.")
        info = GlooUpdateInfo(version, dtype, to_info(self._buckets))
        try:
            self._client.start_weight_update(self._timeout_s)
        except WeightSyncError as error:
            outbox.failure = error
            return None
        return self._threads.submit(self._client.update_weights, asdict(info), self._timeout_s)

    def _buffer(self, index: int) -> torch.Tensor:
        """The bytes of bucket `index` and its digest. Two buffers take turns."""
        return self._buffers[index % 2][: self._buckets[index].wire_bytes(self._source.dtype)]

    def _gather(self, index: int) -> Gather:
        flat = self._buffer(index)[:-DIGEST_BYTES].view(self._source.dtype)
        return self._source.gather(self._buckets[index], flat)

    def _broadcast(self, buffer: torch.Tensor) -> dist.Work:
        return self._group.broadcast(buffer)

    def _conclude(self, version: int, digest: str, answer: Future[None] | None, failure: Exception | None) -> None:
        """Have the engines serve the version, or say which of them did not get it."""
        if answer is None and failure is not None:
            raise failure
        if answer is None or failure is not None:
            self._broken = True
            progress = self._progress(version)
            self._group.close()
            raise WeightSyncError(f"version {version}: {failure}\n{progress}") from failure
        self._await(answer)
        received = self._client.finish_weight_update(version, digest, self._timeout_s)
        wrong = [f"engine {name}: version {version}: digest {d}, need {digest}" for name, d in received.items()]
        if any(d != digest for d in received.values()):
            raise WeightSyncError("\n".join(wrong))

    def _await(self, answer: Future[None]) -> None:
        """Hear the engines out. The client's own deadline comes first, since it can tell who is silent."""
        patience_s = self._timeout_s + CLIENT_MARGIN_S + LOOKING_S
        wait([answer], timeout=patience_s)
        if not answer.done():
            raise WeightSyncError(f"engines {', '.join(self._client.engine_names)}: no answer within {patience_s:g} s")
        answer.result()

    def _progress(self, version: int) -> str:
        """One line an engine process: how many buckets it had verified."""
        lines = []
        for name, rank in self._receivers():
            key = progress_key(version, rank)
            count = int(self._store.get(key)) if self._store.check([key]) else 0
            lines.append(f"engine {name}: version {version}: stopped at bucket {count + 1} of {len(self._buckets)}")
        return "\n".join(lines)

    def _receivers(self) -> list[tuple[str, int]]:
        """(engine, rank in the group) of every receiving process."""
        names = [name for name in self._client.engine_names for _ in range(self._ranks_per_engine)]
        return list(zip(names, range(1, len(names) + 1), strict=True))

    def _join(self, master_address: str) -> GlooGroup:
        """Call the receivers and wait for them. Raises WeightSyncError that names those who did not come."""
        world_size = len(self._receivers()) + 1
        infos = [
            asdict(GlooInitInfo(name, master_address, self._store.port, rank, world_size, self._timeout_s))
            for name, rank in self._receivers()[:: self._ranks_per_engine]
        ]
        deadline = time.monotonic() + self._timeout_s
        # The client waits a little longer: those who came and wait for the others are not to be blamed.
        answer = self._threads.submit(self._client.init_weight_transfer, infos, self._timeout_s + CLIENT_MARGIN_S)
        missing = self._receivers()
        while missing and not answer.done() and time.monotonic() < deadline:
            time.sleep(0.01)
            missing = [(name, rank) for name, rank in missing if not self._store.check([joined_key(rank)])]
        if answer.done():
            answer.result()
        if missing:
            names = ", ".join(sorted({name for name, _ in missing}))
            raise WeightSyncError(f"engine {names}: did not join the weight transfer group in {self._timeout_s:g} s")
        try:
            group = GlooGroup(self._store, 0, world_size, self._timeout_s)
        except RuntimeError as error:
            raise WeightSyncError(f"the weight transfer group cannot be built: {error}") from error
        self._await(answer)
        return group


class _Outbox:
    """The broadcast under way. The first failure stays, and nothing is sent after it."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self.work: dist.Work | None = None
        self.failure: Exception | None = None

    def wait(self) -> None:
        """Until the broadcast is done, or has failed."""
        work, self.work = self.work, None
        if work is not None and self.failure is None:
            try:
                work.wait(self._timeout)
            except RuntimeError as error:
                self.failure = error


class GatherOnlySender:
    """The other trainer ranks: they give rank 0 their shards, and never meet an engine. Medium-blind."""

    def __init__(self, source: WeightSource, *, bucket_bytes: int, timeout_s: float) -> None:
        self._source = source
        self._timeout_s = timeout_s
        self._buckets = plan_buckets(source.specs(), source.dtype, bucket_bytes)

    def send(self, version: int) -> SyncReport:
        """See `WeightSender.send`."""
        start = time.monotonic()
        gathers = deque[Gather](maxlen=2)
        for bucket in self._buckets:
            gathers.append(self._source.gather(bucket, None))
            if len(gathers) == 2:
                gathers.popleft().wait(self._timeout_s)
        for gather in gathers:
            gather.wait(self._timeout_s)
        return SyncReport(
            version=version,
            digest="",
            num_bytes=0,
            seconds=time.monotonic() - start,
            num_buckets=len(self._buckets),
            num_remote_calls=0,
        )

    def close(self) -> None:
        """Nothing to leave."""
