"""What the GPU backends share: our source and client as the interfaces that vLLM's trainer engines use.

vLLM moves the bytes, and we add the digest. The trainer computes each tensor's checksum on its GPU when it passes the
tensor to vLLM; the receiving engine does so when it takes the tensor from vLLM, before loading it. Equal digests mean
that every parameter was transferred unchanged.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine
from vllm.distributed.weight_transfer.base import WeightSource as VllmWeightSource

from rlhf.engines.weight_sync.base import HEALTH_CHECK_S, EngineClient, require_equal_digests
from rlhf.engines.weight_sync.buckets import plan_buckets
from rlhf.engines.weight_sync.checksum import TensorDigest
from rlhf.engines.weight_sync.source import WeightSource
from rlhf.errors import WeightSyncError
from rlhf.types import SyncReport

POLL_S = 0.1


class DigestingSource(VllmWeightSource):  # type: ignore[misc]
    """Our `WeightSource` as vLLM's: every full tensor, bucket by bucket, on every trainer rank."""

    def __init__(self, source: WeightSource, bucket_bytes: int, *, is_sender: bool = True) -> None:
        """Only the digest of the rank that sends is compared with those of the engines; the others compute none."""
        self.dtype = source.dtype
        self.buckets = plan_buckets(source.specs(), source.dtype, bucket_bytes)
        self.digest = TensorDigest()
        self._source = source
        self._is_sender = is_sender

    @property
    def num_bytes(self) -> int:
        """Bytes of one version."""
        return sum(bucket.numel for bucket in self.buckets) * self.dtype.itemsize

    @property
    def largest_parameter_bytes(self) -> int:
        """The least size of a transfer buffer."""
        return max(spec.numel for bucket in self.buckets for spec in bucket.parameters) * self.dtype.itemsize

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and full shape of every tensor, in the order of iteration."""
        return [ParamMeta(spec.name, self.dtype, spec.shape) for bucket in self.buckets for spec in bucket.parameters]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.digest = TensorDigest()
        for bucket in self.buckets:
            tensors = self._source.materialize(bucket)
            yield from self.digest.record(tensors) if self._is_sender else tensors


class VllmClient:
    """Our `EngineClient` with the four methods that vLLM's trainer engines call; the last one ends a version."""

    def __init__(self, client: EngineClient, source: DigestingSource, num_receivers: int, timeout_s: float) -> None:
        self.version = -1
        self.digest = ""
        self.num_calls = 0
        self.failure: WeightSyncError | None = None
        """Why the engines could not join; None if they could."""
        self._client = client
        self._source = source
        self._ranks_per_engine = num_receivers // len(client.engine_names)
        self._timeout_s = timeout_s

    def init_weight_transfer_engine(self, init_info: Mapping[str, object]) -> None:
        """Give each engine its own ranks in the group, after those of the engines before it."""
        offsets = [1 + i * self._ranks_per_engine for i in range(len(self._client.engine_names))]
        infos = [
            {**init_info, "rank_offset": offset} if "rank_offset" in init_info else init_info for offset in offsets
        ]
        try:
            self._client.init_weight_transfer(infos, self._timeout_s)
        except WeightSyncError as error:
            self.failure = error
            raise

    def start_weight_update(self) -> None:
        self._count()
        self._client.start_weight_update(self._timeout_s)

    def update_weights(self, update_info: Mapping[str, object]) -> None:
        self._count()
        self._client.update_weights(update_info, self._timeout_s)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        del weight_version  # vLLM's engines do not pass one
        self._count()
        self.digest = self._source.digest.hexdigest()
        received = self._client.finish_weight_update(self.version, self.digest, self._timeout_s)
        require_equal_digests(self.version, self.digest, received)

    def _count(self) -> None:
        self.num_calls += len(self._client.engine_names)


def open_with_deadline(
    start: Callable[[], TrainerWeightTransferEngine], client: VllmClient, timeout_s: float
) -> TrainerWeightTransferEngine:
    """The trainer engine that `start` opens, on the calling thread's device.

    vLLM calls the engines from a thread of its own, waits five minutes for them whatever timeout was set, and reports
    only the timeout. Here our timeout applies, and the engines' own errors take precedence.

    Consumes: the engine that `start` returns, on a thread of its own. Waits for: that thread. Unblocked by: its end, a
    failure that the client records, or the timeout.

    Raises:
        WeightSyncError: engines could not join, or not in time.
    """
    device = torch.accelerator.current_device_index()

    def on_device() -> TrainerWeightTransferEngine:
        torch.accelerator.set_device_index(device)  # a thread starts on device 0
        return start()

    threads = ThreadPoolExecutor(1, thread_name_prefix="weight-sync-start")
    opening = threads.submit(on_device)
    threads.shutdown(wait=False)
    limit_s = timeout_s + HEALTH_CHECK_S
    deadline = time.monotonic() + limit_s
    while client.failure is None and time.monotonic() < deadline and not opening.done():
        wait([opening], timeout=POLL_S)
    if client.failure is not None:
        raise client.failure
    if not opening.done():
        raise WeightSyncError(f"the weight transfer group was not built in {limit_s:g} s")
    try:
        return opening.result()
    except RuntimeError as error:
        raise WeightSyncError(f"the weight transfer group cannot be built: {error}") from error


class VllmSender:
    """A vLLM trainer engine as a `WeightSender`, with a timeout, which vLLM's engine lacks. It is longer than the
    client's, because the client can name the engine that does not reply."""

    def __init__(
        self,
        engine: TrainerWeightTransferEngine,
        client: VllmClient,
        source: DigestingSource,
        timeout_s: float,
    ) -> None:
        self._engine = engine
        self._client = client
        self._source = source
        self._timeout_s = timeout_s
        self._device = torch.accelerator.current_device_index()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="weight-sync")

    def send(self, version: int) -> SyncReport:
        """See `WeightSender.send`. A transfer that times out cannot be canceled: its thread is abandoned, and the
        processes of the trainer and of the engines must be replaced."""
        start = time.monotonic()
        self._client.version, self._client.num_calls = version, 0
        sending = self._threads.submit(self._send)
        limit_s = self._timeout_s + HEALTH_CHECK_S
        wait([sending], timeout=limit_s)
        if not sending.done():
            raise WeightSyncError(f"version {version}: not transferred in {limit_s:g} s")
        try:
            sending.result()
        except RuntimeError as error:  # a collective whose peer died, which no engine could report
            raise WeightSyncError(f"version {version}: the transfer failed: {error}") from error
        return SyncReport(
            version=version,
            digest=self._client.digest,
            num_bytes=self._source.num_bytes,
            seconds=time.monotonic() - start,
            num_buckets=len(self._source.buckets),
            num_remote_calls=self._client.num_calls,
        )

    def close(self) -> None:
        """See `WeightSender.close`."""
        self._threads.shutdown(wait=False)
        self._engine.shutdown()

    def _send(self) -> None:
        torch.accelerator.set_device_index(self._device)  # a thread starts on device 0
        self._engine.send_weights()
