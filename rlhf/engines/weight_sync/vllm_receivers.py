"""The receiving engines that run in vLLM's workers. Imported in those workers only."""

from collections.abc import Iterable, Mapping

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferInitInfo

from rlhf.engines.weight_sync.checksum import TensorDigest
from rlhf.engines.weight_sync.complete import layers_without_weights, require_none
from rlhf.engines.weight_sync.cpu_reload import CpuReload
from rlhf.engines.weight_sync.gloo import GlooReceiver
from rlhf.engines.weight_sync.gloo_group import GlooInitInfo, GlooUpdateInfo
from rlhf.engines.weight_sync.gpt_oss import LoadableModel, load_sinks_in_place, reloadable
from rlhf.errors import WeightSyncError


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):  # type: ignore[misc]
    """Receives over gloo; for models on CPU."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    received = ""
    """Digest of the last complete version."""
    _receiver: GlooReceiver | None = None
    _reload: CpuReload | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the trainer's group, and leave any earlier one."""
        self.shutdown()
        self._receiver = GlooReceiver(init_info, self.parallel_config.rank)

    def start_weight_update(self) -> None:
        """Prepare every layer to be reloaded."""
        self.received = ""
        self.reload.begin()

    def update_weights(self, update_info: Mapping[str, object]) -> None:
        """Receive one version and load it. (The base class would synchronize with an accelerator, which a CPU lacks.)

        Raises:
            WeightSyncError: some of it did not arrive as it was sent, or a linear layer got no weights.
        """
        try:
            self.receive_weights(self.parse_update_info(update_info))
        finally:
            self.reload.end()  # else partly loaded layers would count these weights as part of the next version
        self.reload.require_complete()

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive and load every bucket. Raises WeightSyncError."""
        with self.reload.scratch:
            self.received = self.receiver.receive(update_info, reloadable(self.model).load_weights)

    @property
    def reload(self) -> CpuReload:
        """The reload of the model's layers."""
        if self._reload is None:
            self._reload = CpuReload(self.model, self.model_config)
        return self._reload

    @property
    def receiver(self) -> GlooReceiver:
        """This process's receiver. Raises WeightSyncError if no group was joined."""
        if self._receiver is None:
            raise WeightSyncError("no weight transfer group was joined")
        return self._receiver

    def finish_weight_update(self) -> None:
        """Nothing to do: one update carries a complete version."""

    def shutdown(self) -> None:
        """Leave the group."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None


class _DigestingModel:
    """Wraps a model while its weights are loaded, and records their digest."""

    def __init__(self, model: LoadableModel, digest: TensorDigest) -> None:
        self._model = model
        self._digest = digest

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return self._model.load_weights(self._digest.record(weights))


class DigestingEngine(WeightTransferEngine):  # type: ignore[misc]
    """Adds to vLLM's own engines a digest of the weights that arrive, before they are loaded."""

    model: LoadableModel
    received = ""
    """Digest of the last complete version."""

    def start_weight_update(self) -> None:
        self._digest = TensorDigest()
        load_sinks_in_place(self._module)
        super().start_weight_update()

    @property
    def _module(self) -> torch.nn.Module:
        assert isinstance(self.model, torch.nn.Module)
        return self.model

    @property
    def load_target(self) -> LoadableModel:
        """What the received weights are loaded into."""
        return reloadable(self.model)

    def receive_weights(self, update_info: object) -> None:
        model = self.model
        self.model = _DigestingModel(self.load_target, self._digest)
        try:
            super().receive_weights(update_info)
        finally:
            self.model = model

    def finish_weight_update(self) -> None:
        """Raises WeightSyncError where a linear layer got no weights."""
        bare = layers_without_weights(self._module)
        super().finish_weight_update()
        require_none(bare)
        self.received = self._digest.hexdigest()


class _InTurn:
    """Ends what loading has started on a GPU before the next packed buffer is received.

    vLLM receives buffers on two streams in turn. A layer whose weights lie in two buffers is loaded on the second one's
    stream, from memory of the first one's: nothing else keeps that stream from reading before they have arrived, or
    the other from receiving into memory that is still read.
    """

    def __init__(self, model: LoadableModel) -> None:
        self._model = model

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = self._model.load_weights(weights)
        torch.cuda.current_stream().synchronize()
        return loaded


class NcclWeightTransferEngine(DigestingEngine, NCCLWeightTransferEngine):  # type: ignore[misc]
    """vLLM's NCCL engine, with a digest of the broadcast weights."""

    @property
    def load_target(self) -> LoadableModel:
        return _InTurn(super().load_target)

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Join the trainer's group, and leave any earlier one, of which a member may be lost: that aborts its
        communicator, which waits for nobody."""
        self.shutdown()
        super().init_transfer_engine(init_info)


class IpcWeightTransferEngine(DigestingEngine, IPCWeightTransferEngine):  # type: ignore[misc]
    """vLLM's CUDA IPC engine, with a digest of the weights read from the trainer's memory."""
