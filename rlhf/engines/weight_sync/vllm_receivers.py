"""The receiving engines that vLLM's workers run. Imported only inside vLLM's workers."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

from rlhf.engines.weight_sync.checksum import TensorDigest
from rlhf.engines.weight_sync.cpu_reload import CpuReload
from rlhf.engines.weight_sync.gloo import GlooReceiver
from rlhf.engines.weight_sync.gloo_group import GlooInitInfo, GlooUpdateInfo
from rlhf.errors import WeightSyncError


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):  # type: ignore[misc]
    """Receives through gloo; for models on the CPU."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    received = ""
    """Digest of the last whole version."""
    _receiver: GlooReceiver | None = None
    _reload: CpuReload | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the trainer's group, leaving any earlier one."""
        self.shutdown()
        self._receiver = GlooReceiver(init_info, self.parallel_config.rank)

    def start_weight_update(self) -> None:
        """Prepare every layer for being loaded again."""
        self.received = ""
        self.reload.begin()

    def update_weights(self, update_info: Mapping[str, object]) -> None:
        """Receive one version and put it in place. (The base class would wait for an accelerator that is not there.)

        Raises:
            WeightSyncError: not all of it arrived as it was sent, or a linear layer got nothing.
        """
        try:
            self.receive_weights(self.parse_update_info(update_info))
        finally:
            self.reload.end()  # layers half loaded would count what they got as part of the next version
        self.reload.require_whole()

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive and load every bucket. Raises WeightSyncError."""
        with self.reload.scratch:
            self.received = self.receiver.receive(update_info, self.model.load_weights)

    @property
    def reload(self) -> CpuReload:
        """How the model is loaded."""
        if self._reload is None:
            self._reload = CpuReload(self.model, self.model_config)
        return self._reload

    @property
    def receiver(self) -> GlooReceiver:
        """This process's end of the group. Raises WeightSyncError where none was joined."""
        if self._receiver is None:
            raise WeightSyncError("no weight transfer group was joined")
        return self._receiver

    def finish_weight_update(self) -> None:
        """Nothing is left to do: a version comes whole, in one update."""

    def shutdown(self) -> None:
        """Leave the group."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None


class LoadableModel(Protocol):
    """What every vLLM model can do."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]: ...


class _DigestingModel:
    """Stands in for a model whose weights are being loaded, and takes note of them."""

    def __init__(self, model: LoadableModel, digest: TensorDigest) -> None:
        self._model = model
        self._digest = digest

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return self._model.load_weights(self._digest.see(weights))


class DigestingEngine(WeightTransferEngine):  # type: ignore[misc]
    """What vLLM's own engines need beside what they do: a digest of what arrives, before it is loaded."""

    model: LoadableModel
    received = ""
    """Digest of the last whole version."""

    def start_weight_update(self) -> None:
        self._digest = TensorDigest()
        super().start_weight_update()

    @property
    def loads(self) -> LoadableModel:
        """What takes the weights that arrive."""
        return self.model

    def receive_weights(self, update_info: object) -> None:
        model = self.model
        self.model = _DigestingModel(self.loads, self._digest)
        try:
            super().receive_weights(update_info)
        finally:
            self.model = model

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self.received = self._digest.hexdigest()


class NcclWeightTransferEngine(DigestingEngine, NCCLWeightTransferEngine):  # type: ignore[misc]
    """vLLM's NCCL engine, with a digest of what came out of the broadcasts."""


class IpcWeightTransferEngine(DigestingEngine, IPCWeightTransferEngine):  # type: ignore[misc]
    """vLLM's CUDA IPC engine, with a digest of what was read from the trainer's memory."""
