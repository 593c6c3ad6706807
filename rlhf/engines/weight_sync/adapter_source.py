"""The LoRA adapters of a model without the model: all that training changes, for engines that apply LoRA themselves."""

from collections.abc import Iterator

import torch

from rlhf.engines.models.adapter_names import FILE_DOWN, layer_in_file, names_in_file
from rlhf.engines.models.adapters import adapters_of
from rlhf.engines.weight_sync.buckets import Bucket, ParameterSpec, dtype_of
from rlhf.engines.weight_sync.source import Done, Gather


class AdapterSource:
    """Satisfies `WeightSource`, with the names of an adapter file. B is sent multiplied by its scale, so that a
    receiver just adds B @ A."""

    def __init__(self, module: torch.nn.Module, dtype: str) -> None:
        """`module` is replicated, or partitioned by ZeRO-3; engines compute in `dtype` (float32, bfloat16)."""
        self.dtype = dtype_of(dtype)
        self.device = next(module.parameters()).device
        self._adapters = {one.layer: one for one in adapters_of(module).values()}

    def specs(self) -> list[ParameterSpec]:
        return [
            ParameterSpec(name, tuple(getattr(parameter, "ds_shape", parameter.shape)))
            for layer, adapter in self._adapters.items()
            for name, parameter in zip(names_in_file(layer), (adapter.down, adapter.up), strict=True)
        ]

    @torch.no_grad()
    def gather(self, bucket: Bucket, flat: torch.Tensor | None) -> Gather:
        tensors = dict(self.materialize(bucket))
        if flat is not None:
            for name, view in bucket.views(flat):
                view.copy_(tensors[name])
        return Done()  # `materialize` has gathered the small matrices already

    @torch.no_grad()
    def materialize(self, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
        for spec in bucket.parameters:
            # Gathered right before use: the caller may use another CUDA stream for each tensor.
            gathered = self._adapters[layer_in_file(spec.name)].gathered()
            tensor = gathered.down if spec.name.endswith(FILE_DOWN) else gathered.up.float() * gathered.scale
            yield spec.name, tensor.to(self.device, self.dtype)
