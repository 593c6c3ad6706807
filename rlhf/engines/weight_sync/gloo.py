"""Weight sync over a gloo process group of trainer rank 0 and every receiving process. For CPU; needs no vLLM.

A bucket is one broadcast of one flat buffer, which carries its own digest. Three things overlap on the sender: the
gather of the next bucket, the digest of the current one, and the broadcast of the previous one.

The group has its own TCP store, beside the trainer's default group. A timeout breaks the group for good (gloo closes
its connections). A bucket that fails verification does not: every receiver takes part in all broadcasts, and raises
after the last.
"""

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist

from rlhf.engines.weight_sync.base import HEALTH_CHECK_S, EngineClient, require_equal_digests
from rlhf.engines.weight_sync.buckets import (
    DIGEST_BYTES,
    Bucket,
    append_digest,
    dtype_of,
    from_info,
    plan_buckets,
    to_info,
    verify_digest,
    version_digest,
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
"""start, update and finish to each engine, whatever the number of parameters or buckets."""
CLIENT_MARGIN_S = 1.0
RELEASE_POLL_S = 1e-4


class GlooReceiver:
    """One receiving process.

    Consumes: broadcasts of buckets from rank 0. Produces: loaded parameters, and its progress in the store. Waits for:
    the next broadcast. Unblocked by: the broadcast, its timeout, or a sender that closes the group.
    """

    def __init__(self, info: GlooInitInfo, local_rank: int = 0) -> None:
        """Join the group. Raises WeightSyncError if the trainer or another engine does not join in time."""
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
        """Receive one version and `load` each bucket whose digest is right; returns the digest of the version.

        `load` may keep the tensors: their memory is not reused while anything refers to them. Raises WeightSyncError
        that names engine, version and bucket.
        """
        dtype, buckets = dtype_of(info.dtype), from_info(info.buckets)
        largest = max(bucket.wire_bytes(dtype) for bucket in buckets)
        if largest != self._pool.nbytes:
            self._pool = BufferPool(largest)
        digests: list[bytes] = []
        problem: WeightSyncError | None = None
        arriving = self._start_receiving(buckets[0], dtype)
        for index, bucket in enumerate(buckets):
            arrived = arriving
            where = f"engine {self.engine}: version {info.version}: bucket {index + 1} of {len(buckets)}"
            try:
                if index + 1 < len(buckets):
                    arriving = self._start_receiving(buckets[index + 1], dtype)
                arrived.wait(self._timeout)
            except RuntimeError as error:
                raise WeightSyncError(f"{where} did not arrive: {error}") from error
            digest, whole = verify_digest(arrived.buffer)
            digests.append(digest)
            self._store.set(progress_key(info.version, self._rank), str(index + 1))
            if not whole:
                names = f"{bucket.parameters[0].name} to {bucket.parameters[-1].name}"
                problem = problem or WeightSyncError(f"{where} ({names}) differs from what was sent: wrong digest")
            if problem is None:
                try:
                    load(bucket.views(arrived.buffer[:-DIGEST_BYTES].view(dtype)))
                except Exception as error:
                    problem = WeightSyncError(f"{where} cannot be loaded: {error!r}")
        if problem is not None:
            raise problem
        return version_digest(dtype, buckets, digests)

    def close(self) -> None:
        """Leave the group."""
        self._group.close()

    def _start_receiving(self, bucket: Bucket, dtype: torch.dtype) -> "_Arrival":
        return _Arrival(self._pool.take(bucket.wire_bytes(dtype)), self._group)


class _Arrival:
    """A broadcast that is received.

    The thread of gloo holds the tensor for a moment after the broadcast is done. A pool that counted that reference
    would take one more buffer whenever the thread is late.
    """

    def __init__(self, buffer: torch.Tensor, group: GlooGroup) -> None:
        lent = buffer[:]
        self.buffer = buffer
        self._lent = weakref.ref(lent)
        self._work: dist.Work | None = group.broadcast(lent)

    def wait(self, timeout: timedelta) -> None:
        """Block until the buffer is filled and nobody else holds it. Raises RuntimeError if it does not arrive."""
        assert self._work is not None, "waits once"
        self._work.wait(timeout)
        self._work = None  # it holds the tensor as well
        deadline = time.monotonic() + timeout.total_seconds()
        while self._lent() is not None and time.monotonic() < deadline:
            time.sleep(RELEASE_POLL_S)


class GlooSender:
    """Trainer rank 0: gathers buckets, appends digests, broadcasts.

    Consumes: shards, from the source. Produces: broadcasts, and control-plane calls from a thread of its own, because
    `update_weights` returns only after the last broadcast. Waits for: the receivers that join; each gather and
    broadcast; the reply to `update_weights`. Unblocked by: those events, or `timeout_s` for each. After a failed
    broadcast it still finishes all gathers, since the trainer's other ranks wait in them.
    """

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
            raise WeightSyncError(f"version {version}: the weight transfer group has failed. Build a new sender.")
        start = time.monotonic()
        broadcast = _PendingBroadcast(self._timeout_s)
        reply = self._start_update(version, broadcast)
        digests = []
        gather = self._gather(0)
        for index in range(len(self._buckets)):
            gather.wait(self._timeout_s)
            buffer = self._buffer(index)
            digests.append(append_digest(buffer))
            broadcast.wait()
            # Even if the engines failed, the other trainer ranks must be able to send their shards.
            if index + 1 < len(self._buckets):
                gather = self._gather(index + 1)
            broadcast.start(self._broadcast, buffer)
        broadcast.wait()
        digest = version_digest(self._source.dtype, self._buckets, digests)
        self._finish_update(version, digest, reply, broadcast.failure)
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

    def _start_update(self, version: int, broadcast: "_PendingBroadcast") -> Future[None] | None:
        """Have the engines stop serving and start to receive. If one fails: None, and the failure in `broadcast`."""
        dtype = str(self._source.dtype).removeprefix("torch.")
        info = GlooUpdateInfo(version, dtype, to_info(self._buckets))
        try:
            self._client.start_weight_update(self._timeout_s)
        except WeightSyncError as error:
            broadcast.failure = error
            return None
        return self._threads.submit(self._client.update_weights, asdict(info), self._timeout_s)

    def _buffer(self, index: int) -> torch.Tensor:
        """The buffer of bucket `index` and its digest. Two buffers are used in turn."""
        return self._buffers[index % 2][: self._buckets[index].wire_bytes(self._source.dtype)]

    def _gather(self, index: int) -> Gather:
        flat = self._buffer(index)[:-DIGEST_BYTES].view(self._source.dtype)
        return self._source.gather(self._buckets[index], flat)

    def _broadcast(self, buffer: torch.Tensor) -> dist.Work:
        return self._group.broadcast(buffer)

    def _finish_update(self, version: int, digest: str, reply: Future[None] | None, failure: Exception | None) -> None:
        """Have the engines serve the version, or raise WeightSyncError that names those that did not receive it."""
        if reply is None:
            assert failure is not None
            raise failure
        if failure is not None:
            self._broken = True
            progress = self._progress(version)
            self._group.close()  # an engine that still waits for a broadcast fails at once, so the reply comes soon
            reason = self._reason(reply)
            raise WeightSyncError(f"version {version}: {reason}\n{progress}\n{failure}") from failure
        self._wait_for(reply)
        received = self._client.finish_weight_update(version, digest, self._timeout_s)
        require_equal_digests(version, digest, received)

    def _wait_for(self, reply: Future[None]) -> None:
        """Wait for the engines' reply. The client's own timeout comes first, because it can name the engine that does
        not reply."""
        limit_s = self._timeout_s + CLIENT_MARGIN_S + HEALTH_CHECK_S
        wait([reply], timeout=limit_s)
        if not reply.done():
            raise WeightSyncError(f"engines {', '.join(self._client.engine_names)}: no reply within {limit_s:g} s")
        reply.result()

    def _reason(self, reply: Future[None]) -> str:
        """What the client knows about a broadcast that failed: which engines are stopped or gone."""
        try:
            self._wait_for(reply)
        except WeightSyncError as error:
            return str(error)
        return "a broadcast failed, and every engine says that it received the weights"

    def _progress(self, version: int) -> str:
        """A line for each receiving process: how many buckets it has verified."""
        lines = []
        for name, rank in self._receivers():
            key = progress_key(version, rank)
            count = int(self._store.get(key)) if self._store.check([key]) else 0
            lines.append(f"engine {name}: {count} of {len(self._buckets)} buckets of version {version} arrived")
        return "\n".join(lines)

    def _receivers(self) -> list[tuple[str, int]]:
        """(engine, rank in the group) for every receiving process."""
        names = [name for name in self._client.engine_names for _ in range(self._ranks_per_engine)]
        return list(zip(names, range(1, len(names) + 1), strict=True))

    def _join(self, master_address: str) -> GlooGroup:
        """Have the receivers join the group, and wait for them. Raises WeightSyncError that names those missing."""
        world_size = len(self._receivers()) + 1
        infos = [
            asdict(GlooInitInfo(name, master_address, self._store.port, rank, world_size, self._timeout_s))
            for name, rank in self._receivers()[:: self._ranks_per_engine]
        ]
        deadline = time.monotonic() + self._timeout_s
        # The client waits a little longer, so that the error names the engines that did not join, rather than those
        # that joined and wait for the others.
        reply = self._threads.submit(self._client.init_weight_transfer, infos, self._timeout_s + CLIENT_MARGIN_S)
        missing = self._receivers()
        while missing and not reply.done() and time.monotonic() < deadline:
            time.sleep(0.01)
            missing = [(name, rank) for name, rank in missing if not self._store.check([joined_key(rank)])]
        if reply.done():
            reply.result()
        if missing:
            names = ", ".join(sorted({name for name, _ in missing}))
            raise WeightSyncError(f"engine {names}: did not join the weight transfer group in {self._timeout_s:g} s")
        try:
            group = GlooGroup(self._store, 0, world_size, self._timeout_s)
        except RuntimeError as error:
            raise WeightSyncError(f"the weight transfer group cannot be built: {error}") from error
        self._wait_for(reply)
        return group


class _PendingBroadcast:
    """The broadcast in progress. The first failure is kept, and nothing is sent after it."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        self._work: dist.Work | None = None
        self.failure: Exception | None = None

    def start(self, broadcast: Callable[[torch.Tensor], dist.Work], buffer: torch.Tensor) -> None:
        """Start to send `buffer`, unless an earlier broadcast failed."""
        if self.failure is None:
            try:
                self._work = broadcast(buffer)
            except RuntimeError as error:  # a connection is closed already
                self.failure = error

    def wait(self) -> None:
        """Block until the broadcast is done or has failed."""
        work, self._work = self._work, None
        if work is not None and self.failure is None:
            try:
                work.wait(self._timeout)
            except RuntimeError as error:
                self.failure = error


class GatherOnlySender:
    """The other trainer ranks: they send their shards to rank 0, and do not communicate with engines.

    Rank 0 takes a shard only after it has waited for the engines. It can name the engine that does not reply, so a rank
    here waits for longer than rank 0 does.
    """

    def __init__(self, source: WeightSource, *, bucket_bytes: int, timeout_s: float) -> None:
        self._source = source
        self._timeout_s = timeout_s + CLIENT_MARGIN_S + HEALTH_CHECK_S
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
        """Nothing to close."""
