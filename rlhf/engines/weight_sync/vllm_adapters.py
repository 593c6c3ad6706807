"""Receiving engines for a model that stays: vLLM adds the newest adapters to it at every token. Imported only inside
vLLM's workers."""

from collections.abc import Iterable, Mapping
from typing import Protocol, cast

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper

from rlhf.engines.models.adapter_names import FILE_DOWN
from rlhf.engines.weight_sync.checksum import TensorDigest
from rlhf.engines.weight_sync.gloo_group import GlooUpdateInfo
from rlhf.engines.weight_sync.plugin import ADAPTER_ID
from rlhf.engines.weight_sync.vllm_receivers import (
    DigestingEngine,
    GlooWeightTransferEngine,
    IpcWeightTransferEngine,
    NcclWeightTransferEngine,
)
from rlhf.errors import WeightSyncError


class _Adaptable(Protocol):
    lora_manager: LoRAModelManager


class ArrivingAdapters:
    """Stands in for the model that is being loaded: keeps what arrives until all of it is there."""

    def __init__(self, model: object) -> None:
        """`model` is vLLM's, made for adapters."""
        self._manager: LoRAModelManager = cast(_Adaptable, model).lora_manager
        self._tensors: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy them: a sender uses its buffers again."""
        arrived = {name: tensor.to("cpu", copy=True) for name, tensor in weights}
        self._tensors |= arrived
        return set(arrived)

    def install(self) -> None:
        """Let every answer from now on be computed with these adapters, and no longer with those before."""
        manager = self._manager
        ranks = {tensor.shape[0] for name, tensor in self._tensors.items() if name.endswith(FILE_DOWN)}
        if len(ranks) != 1:
            raise WeightSyncError(f"adapters of one rank were expected, and those of {sorted(ranks)} came")
        (rank,) = ranks
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        adapters = LoRAModel.from_lora_tensors(
            ADAPTER_ID,
            self._tensors,
            PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),
            device="cpu",
            dtype=manager.lora_config.lora_dtype,
            model_vocab_size=manager.vocab_size,
            weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
        )
        manager.remove_adapter(ADAPTER_ID)
        manager.add_adapter(adapters)
        if unplaced := sorted(set(adapters.loras) - set(manager.modules)):
            raise WeightSyncError(f"vLLM has no place for {len(unplaced)} of the adapters (first: {unplaced[0]})")
        manager.activate_adapter(ADAPTER_ID)


class GlooAdapterEngine(GlooWeightTransferEngine):
    """Receives adapters through gloo."""

    def start_weight_update(self) -> None:
        self.received = ""
        self._arriving = ArrivingAdapters(self.model)

    def update_weights(self, update_info: Mapping[str, object]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        self.received = self.receiver.receive(update_info, self._arriving.load_weights)

    def finish_weight_update(self) -> None:
        """Nothing: vLLM forgets all adapters when this returns."""

    def install(self) -> None:
        """Let what was received be what answers are computed with."""
        self._arriving.install()


class _KeepsAdapters(DigestingEngine):
    """What vLLM's own engines need, to receive adapters: the model that stays is not told of an update."""

    def start_weight_update(self) -> None:
        self._digest, self._arriving = TensorDigest(), ArrivingAdapters(self.model)

    @property
    def loads(self) -> ArrivingAdapters:
        return self._arriving

    def finish_weight_update(self) -> None:
        self.received = self._digest.hexdigest()

    def install(self) -> None:
        """See `GlooAdapterEngine.install`."""
        self._arriving.install()


class NcclAdapterEngine(_KeepsAdapters, NcclWeightTransferEngine):
    """Receives adapters through vLLM's NCCL engine."""


class IpcAdapterEngine(_KeepsAdapters, IpcWeightTransferEngine):
    """Receives adapters through vLLM's CUDA IPC engine."""

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self._packed_importer.close()  # or the trainer's buffer would stay mapped until the next update
