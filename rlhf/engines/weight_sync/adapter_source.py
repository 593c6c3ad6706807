"""The adapters of a model as a source of weights, without the model: all that changes, where engines can add it."""

from collections.abc import Iterator

import torch

from rlhf.engines.adapters import adapters_of
from rlhf.engines.weight_sync.buckets import Bucket, ParameterSpec, dtype_of
from rlhf.engines.weight_sync.source import Gather

PREFIX = "base_model.model."
"""What names of adapters begin with, as peft writes them."""
DOWN, UP = ".lora_A.weight", ".lora_B.weight"


class AdapterSource:
    """Satisfies `WeightSource`. B is sent with its scale multiplied in, so that a receiver adds B @ A as it is."""

    def __init__(self, module: torch.nn.Module, dtype: str) -> None:
        """`module` is whole on every rank, or sharded by ZeRO-3; engines compute in `dtype` (float32, bfloat16)."""
        self.dtype = dtype_of(dtype)
        self.device = next(module.parameters()).device
        self._adapters = {PREFIX + name.removesuffix(".weight"): one for name, one in adapters_of(module).items()}

    def specs(self) -> list[ParameterSpec]:
        return [
            ParameterSpec(layer + ending, tuple(getattr(parameter, "ds_shape", parameter.shape)))
            for layer, adapter in self._adapters.items()
            for ending, parameter in ((DOWN, adapter.down), (UP, adapter.up))
        ]

    @torch.no_grad()
    def gather(self, bucket: Bucket, flat: torch.Tensor | None) -> Gather:
        tensors = dict(self.materialise(bucket))
        if flat is not None:
            for name, view in bucket.views(flat):
                view.copy_(tensors[name])
        return _Done()

    @torch.no_grad()
    def materialise(self, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
        for spec in bucket.parameters:
            # Gathered where it is used: who asks may use another stream of the device for each tensor.
            parts = self._adapters[spec.name.removesuffix(DOWN).removesuffix(UP)].parts()
            tensor = parts.down if spec.name.endswith(DOWN) else parts.up.float() * parts.scale
            yield spec.name, tensor.to(self.device, self.dtype)


class _Done:
    """The small matrices are whole before anything is on its way."""

    def wait(self, timeout_s: float) -> None:
        del timeout_s
