"""Layers of experts that DeepSpeed's AutoEP has spread over ranks (expert parallelism), under the names of the model.

AutoEP replaces a block of experts with a layer of its own: each rank of a group holds some of the experts, whole or, as
ZeRO-3 does, partitioned over the ranks that hold the same ones. The router and shared experts are those of the model,
under other names; the gate and up projections of experts are two tensors instead of one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from rlhf.engines.process.distributed import deepspeed


@dataclass(frozen=True, slots=True)
class SplitTensor:
    """A tensor of all experts of a layer [experts, n, m], of which each rank of a group holds those of some experts."""

    parts: tuple[nn.Parameter, ...]
    """[experts of this rank, n_i, m], one after the other along the second dimension."""
    group: dist.ProcessGroup
    size: int
    """Ranks of the group, in the order of their experts."""

    @property
    def shape(self) -> torch.Size:
        shapes = [getattr(part, "ds_shape", part.shape) for part in self.parts]
        num_experts, _, width = shapes[0]
        return torch.Size((num_experts * self.size, sum(shape[1] for shape in shapes), width))

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @torch.no_grad()
    def whole(self) -> torch.Tensor:
        """The full tensor in new memory, on every rank. Collective."""
        with deepspeed.zero.GatheredParameters(list(self.parts)):
            own = torch.cat([part.detach() for part in self.parts], dim=1)
        everyone = own.new_empty(self.size, *own.shape)
        received = [of_rank.view(-1).view(torch.uint8) for of_rank in everyone]
        dist.all_gather(received, own.view(-1).view(torch.uint8), group=self.group)  # every backend knows bytes
        return everyone.flatten(0, 1)


def split_layers(model: nn.Module) -> dict[str, nn.Module]:
    """AutoEP's layers by name."""
    return {name: module for name, module in model.named_modules() if getattr(module, "_is_autoep_layer", False)}


def num_holders(model: nn.Module) -> int:
    """Ranks that have the experts of a layer among them; 1 for a model whose experts are not spread over ranks."""
    return max((int(vars(layer)["ep_size"]) for layer in split_layers(model).values()), default=1)


def under_own_names(
    model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor | SplitTensor]]:
    """Some of `model`'s parameters and buffers by the names that they have without expert parallelism, and instead of
    what each rank holds of the experts, the tensors that they make up."""
    layers = split_layers(model)
    for name, tensor in tensors:
        layer = next((one for one in layers if name.startswith(f"{one}.")), None)
        if layer is None:
            yield name, tensor
            continue
        inner = name.removeprefix(f"{layer}.")
        yield from ((f"{layer}.{own}", found) for own, found in _in_layer(layers[layer], inner, tensor))


def _in_layer(layer: nn.Module, name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor | SplitTensor]]:
    from deepspeed.module_inject.auto_ep_presets.registry import get_preset  # noqa: PLC0415  it imports much

    held, preset = vars(layer), get_preset(vars(layer)["model_family"])
    module, _, leaf = name.rpartition(".")
    experts = layer.get_submodule("experts")
    assert preset.expert_w3 is None, "transformers holds the gate and up projections of experts in one tensor"
    if module == "experts":
        joined = {"w1": (preset.expert_w1, ("w1", "w3")), "w2": (preset.expert_w2, ("w2",))}
        if leaf in joined:
            own, parts = joined[leaf]
            split = SplitTensor(tuple(experts.get_parameter(part) for part in parts), held["ep_group"], held["ep_size"])
            yield f"{preset.experts_pattern}.{own}", split
        return
    renamed = {
        "router.gate.": f"{preset.router_pattern}.",
        "router.": f"{preset.router_pattern}.",
        "shared_experts.": f"{preset.shared_experts_pattern}.",
        "shared_experts_gate.": f"{preset.shared_experts_gate_pattern}.",
    }
    start = next((start for start in renamed if name.startswith(start)), "")
    yield renamed.get(start, "") + name.removeprefix(start), tensor
