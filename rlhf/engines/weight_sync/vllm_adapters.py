"""Receiving engines for LoRA adapters: the base model stays, and vLLM applies the newest adapters in every forward
pass. Imported in vLLM's workers only."""

from collections.abc import Iterable, Mapping
from typing import Protocol, cast

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.models.utils import PPMissingLayer

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


class IncomingAdapters:
    """Collects the adapters of an update until all of them have arrived. Takes the model's place as load target."""

    def __init__(self, model: object) -> None:
        """`model` is vLLM's model with LoRA enabled."""
        self._manager: LoRAModelManager = cast(_Adaptable, model).lora_manager
        self._tensors: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Keep copies: the sender reuses its buffers."""
        arrived = {name: tensor.to("cpu", copy=True) for name, tensor in weights}
        self._tensors |= arrived
        return set(arrived)

    def install(self) -> None:
        """Replace the active adapters by these. In a stage of a pipeline, those of its layers: it gets all."""
        manager = self._manager
        ranks = {tensor.shape[0] for name, tensor in self._tensors.items() if name.endswith(FILE_DOWN)}
        if len(ranks) != 1:
            raise WeightSyncError(f"expected adapters of one LoRA rank, received ranks {sorted(ranks)}")
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
        others = tuple(f"{name}." for name, layer in manager.model.named_modules() if isinstance(layer, PPMissingLayer))
        without = sorted(set(adapters.loras) - set(manager.modules))
        if unplaced := [name for name in without if not f"{name}.".startswith(others)]:
            raise WeightSyncError(f"vLLM has no place for {len(unplaced)} of the adapters (first: {unplaced[0]})")
        manager.activate_adapter(ADAPTER_ID)


class GlooAdapterEngine(GlooWeightTransferEngine):
    """Receives adapters over gloo."""

    def start_weight_update(self) -> None:
        self.received = ""
        self._arriving = IncomingAdapters(self.model)

    def update_weights(self, update_info: Mapping[str, object]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        self.received = self.receiver.receive(update_info, self._arriving.load_weights)

    def finish_weight_update(self) -> None:
        """Nothing to do here: vLLM removes all adapters when this returns."""

    def install(self) -> None:
        """Make the received adapters the active ones."""
        self._arriving.install()


class _AdapterReceiver(DigestingEngine):
    """Makes vLLM's own engines receive adapters: the base model takes no part in an update."""

    def start_weight_update(self) -> None:
        self._digest, self._arriving = TensorDigest(), IncomingAdapters(self.model)

    @property
    def load_target(self) -> IncomingAdapters:
        return self._arriving

    def finish_weight_update(self) -> None:
        self.received = self._digest.hexdigest()

    def install(self) -> None:
        """See `GlooAdapterEngine.install`."""
        self._arriving.install()


class NcclAdapterEngine(_AdapterReceiver, NcclWeightTransferEngine):
    """Receives adapters with vLLM's NCCL engine."""


class IpcAdapterEngine(_AdapterReceiver, IpcWeightTransferEngine):
    """Receives adapters with vLLM's CUDA IPC engine."""

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self._packed_importer.close()  # else the trainer's buffer would stay mapped until the next update
