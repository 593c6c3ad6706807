"""The receiving engines that vLLM's workers run. Imported only inside vLLM's workers."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlhf.engines.weight_sync.checksum import TensorDigest
from rlhf.engines.weight_sync.gloo import GlooReceiver
from rlhf.engines.weight_sync.gloo_group import GlooInitInfo, GlooUpdateInfo
from rlhf.errors import WeightSyncError


def repack_tied_heads(model: torch.nn.Module) -> int:
    """Pack the output heads whose weight is another layer's; returns how many there are.

    On CPU every linear layer multiplies by a packed copy of its weight (oneDNN), made by the method that processes a
    layer's weights after loading. A layerwise reload runs that method for the layers that it loaded. A tied head is
    never loaded: its parameter is the embedding's, which arrives under the embedding's name, so the reload only puts
    the parameter back and the head goes on multiplying by the copy made when the engine started.
    """
    owners: dict[int, torch.nn.Module] = {}
    tied = []
    for layer in model.modules():
        for parameter in layer.parameters(recurse=False):
            owner = owners.setdefault(id(parameter), layer)
            if owner is not layer and isinstance(layer, ParallelLMHead):
                tied.append(layer)
    for head in tied:
        head.quant_method.process_weights_after_loading(head)
    return len(tied)


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):  # type: ignore[misc]
    """Receives through gloo and loads by layerwise reload; for models on the CPU."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    received = ""
    """Digest of the last whole version."""
    _receiver: GlooReceiver | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the trainer's group, leaving any earlier one."""
        self.shutdown()
        self._receiver = GlooReceiver(init_info, self.parallel_config.rank)

    def start_weight_update(self) -> None:
        """Prepare every layer for being loaded again."""
        self.received = ""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: Mapping[str, object]) -> None:
        """Receive one version. (The base class would wait for an accelerator that is not there.)"""
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except BaseException:
            # Layers half loaded would count what they got as part of the next version.
            finalize_layerwise_reload(self.model, self.model_config)
            raise

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive and load every bucket. Raises WeightSyncError."""
        self.received = self.receiver.receive(update_info, self.model.load_weights)

    @property
    def receiver(self) -> GlooReceiver:
        """This process's end of the group. Raises WeightSyncError where none was joined."""
        if self._receiver is None:
            raise WeightSyncError("no weight transfer group was joined")
        return self._receiver

    def finish_weight_update(self) -> None:
        """Put the loaded layers in place, and the tied heads in order."""
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_heads(self.model)

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
