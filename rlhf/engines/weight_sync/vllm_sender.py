"""What the GPU media share: our source and client in the shapes that vLLM's trainer engines want.

vLLM moves the bytes; the digest is ours. The trainer takes each tensor's checksum on its GPU as it hands it over, the
receiving engine as it gets it out of the transfer and before it is loaded, so equal digests say that every parameter
crossed the medium unchanged.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine
from vllm.distributed.weight_transfer.base import WeightSource as VllmWeightSource

from rlhf.engines.weight_sync.base import LOOKING_S, EngineClient
from rlhf.engines.weight_sync.buckets import plan_buckets
from rlhf.engines.weight_sync.checksum import TensorDigest
from rlhf.engines.weight_sync.source import WeightSource
from rlhf.errors import WeightSyncError
from rlhf.types import SyncReport

LOOK_S = 0.1


class DigestingSource(VllmWeightSource):  # type: ignore[misc]
    """A `WeightSource` of ours as vLLM's: every tensor in full, bucket by bucket, on every trainer rank."""

    def __init__(self, source: WeightSource, bucket_bytes: int) -> None:
        self.dtype = source.dtype
        self.buckets = plan_buckets(source.specs(), source.dtype, bucket_bytes)
        self.digest = TensorDigest()
        self._source = source

    @property
    def num_bytes(self) -> int:
        """Of one version."""
        return sum(bucket.numel for bucket in self.buckets) * self.dtype.itemsize

    @property
    def largest_parameter_bytes(self) -> int:
        """No transfer buffer may be smaller."""
        return max(spec.numel for bucket in self.buckets for spec in bucket.parameters) * self.dtype.itemsize

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and full shape of everything that iteration gives, in its order."""
        return [ParamMeta(spec.name, self.dtype, spec.shape) for bucket in self.buckets for spec in bucket.parameters]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.digest = TensorDigest()
        for bucket in self.buckets:
            yield from self.digest.see(self._source.materialize(bucket))


class VllmClient:
    """An `EngineClient` as vLLM's trainer engines want it: four methods, of which the last ends a version."""

    def __init__(self, client: EngineClient, source: DigestingSource, num_receivers: int, timeout_s: float) -> None:
        self.version = -1
        self.digest = ""
        self.num_calls = 0
        self.failure: WeightSyncError | None = None
        """Why the engines did not join."""
        self._client = client
        self._source = source
        self._ranks_per_engine = num_receivers // len(client.engine_names)
        self._timeout_s = timeout_s

    def init_weight_transfer_engine(self, init_info: Mapping[str, object]) -> None:
        """Give each engine its own place in the group, behind the engines before it."""
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
        wrong = [
            f"engine {name}: version {self.version}: digest {digest}, need {self.digest}"
            for name, digest in received.items()
            if digest != self.digest
        ]
        if wrong:
            raise WeightSyncError("\n".join(wrong))

    def _count(self) -> None:
        self.num_calls += len(self._client.engine_names)


def opened(
    start: Callable[[], TrainerWeightTransferEngine], client: VllmClient, timeout_s: float
) -> TrainerWeightTransferEngine:
    """The trainer engine that `start` opens, on this thread's device.

    vLLM calls the engines from a thread of its own while it waits for them, five minutes whatever was asked for, and
    says that it waited; here the deadline is ours, and what the engines said comes first.

    Raises:
        WeightSyncError: engines did not join, or not in time.
    """
    device = torch.accelerator.current_device_index()

    def on_device() -> TrainerWeightTransferEngine:
        torch.accelerator.set_device_index(device)  # a thread starts on device 0
        return start()

    threads = ThreadPoolExecutor(1, thread_name_prefix="weight-sync-start")
    opening = threads.submit(on_device)
    threads.shutdown(wait=False)
    patience_s = timeout_s + LOOKING_S
    deadline = time.monotonic() + patience_s
    while client.failure is None and time.monotonic() < deadline and not opening.done():
        wait([opening], timeout=LOOK_S)
    if client.failure is not None:
        raise client.failure
    if not opening.done():
        raise WeightSyncError(f"the weight transfer group was not built in {patience_s:g} s")
    try:
        return opening.result()
    except RuntimeError as error:
        raise WeightSyncError(f"the weight transfer group cannot be built: {error}") from error


class VllmSender:
    """A vLLM trainer engine as a `WeightSender`, with a deadline that vLLM's own lacks: after that of the engines'
    answers, since the client can tell who is silent."""

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
        """See `WeightSender.send`. A transfer that passes the deadline cannot be called back: its thread is abandoned,
        and the trainer's process and the engines' must be replaced."""
        start = time.monotonic()
        self._client.version, self._client.num_calls = version, 0
        sending = self._threads.submit(self._send)
        patience_s = self._timeout_s + LOOKING_S
        wait([sending], timeout=patience_s)
        if not sending.done():
            raise WeightSyncError(f"version {version}: not transferred in {patience_s:g} s")
        try:
            sending.result()
        except RuntimeError as error:  # a collective whose other end has gone, which no engine could tell of
            raise WeightSyncError(f"version {version}: the transfer broke off: {error}") from error
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
