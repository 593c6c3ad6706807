"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): two small trainable matrices for each frozen matrix W.

The layers are peft's. Rollout engines and exports get the merged matrix, W + scale * B @ A, under the names of the
model without adapters. A tensor that holds a matrix of each expert of a layer has A and B for each of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from rlhf.config.models import LoraSection
from rlhf.engines.models.adapter_names import (
    DOWN,
    NAME,
    UP,
    expert_tensors,
    is_tensor_adapter,
    linear_layers,
    names_in_file,
    plain_name,
    target_module,
    target_tensor,
)
from rlhf.engines.models.finite_weights import local_shard
from rlhf.engines.process.distributed import deepspeed
from rlhf.errors import ModelError


@dataclass(frozen=True, slots=True)
class Experts:
    """How an adapter holds the matrices of several experts: `down` is [experts * rank, in], all rows of an expert after
    those of the one before; `up` is [out, rank * experts], the columns of all experts beside each other."""

    number: int
    is_transposed: bool
    """The adapted tensor is [experts, in, out], not [experts, out, in]."""


@dataclass(frozen=True, slots=True)
class LoraMatrices:
    """An adapter's full matrices: `down` is A [rank, in], `up` is B [out, rank]; see `Experts` for those of experts.
    `layer` is the path of the module that holds them."""

    layer: str
    down: torch.Tensor
    up: torch.Tensor
    scale: float
    experts: Experts | None = None

    def merged_into(self, matrix: torch.Tensor) -> torch.Tensor:
        """`matrix` [out, in], or the tensor of all experts, with the adapter merged: computed in float32, returned in
        the matrix's dtype."""
        down, up = self.down.to(matrix.device).float(), self.up.to(matrix.device).float()
        if self.experts is None:
            return self._merged(matrix, up @ down)
        downs = down.reshape(self.experts.number, -1, down.shape[1])
        ups = up.reshape(len(up), -1, self.experts.number).permute(2, 0, 1)
        merged = torch.empty_like(matrix)
        for place, expert, one_down, one_up in zip(merged, matrix, downs, ups, strict=True):
            product = one_up @ one_down
            place.copy_(self._merged(expert, product.T if self.experts.is_transposed else product))
        return merged

    def _merged(self, matrix: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        return product.mul_(self.scale).add_(matrix.float()).to(matrix.dtype)


@dataclass(frozen=True, slots=True)
class Adapter:
    """The trainable parameters behind `LoraMatrices`."""

    layer: str
    down: nn.Parameter
    up: nn.Parameter
    scale: float
    experts: Experts | None

    @torch.no_grad()
    def gathered(self) -> LoraMatrices:
        """Full copies of both matrices, on every rank. Collective under ZeRO-3."""
        with deepspeed.zero.GatheredParameters([self.down, self.up]):
            return LoraMatrices(
                self.layer, self.down.detach().clone(), self.up.detach().clone(), self.scale, self.experts
            )


def add_adapters(model: PreTrainedModel, section: LoraSection, *, seed: int, where: str) -> None:
    """Freeze `model` in place and add adapters to the linear layers of its backbone, and to the tensors of experts that
    the section names. A `score` head stays trainable.

    B starts at 0, so the model's outputs do not change; `seed` decides A. Raises ModelError, which begins with `where`
    (policy.lora.targets), if a target matches no layer.
    """
    import peft  # noqa: PLC0415  - takes seconds, and most runs have no adapters

    linear = require_targets(model, section, where)
    chosen = [name for name in linear if not section.targets or target_module(name) in section.targets]
    tensors = [name for name in expert_tensors(model) if target_tensor(name) in section.targets]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=section.rank,
            lora_alpha=section.alpha,
            target_modules=chosen,
            target_parameters=tensors,
            # With dropout, two passes over the same tokens would give different log-probs.
            lora_dropout=0.0,
        )
        try:
            peft.inject_adapter_in_model(config, model, NAME)
        except ValueError as error:
            raise ModelError(f"{where}: peft cannot adapt these layers: {error}") from error
    if set(adapters_of(model)) != {*(f"{name}.weight" for name in chosen), *tensors}:
        raise ModelError(f"{where}: peft adapts other layers of a {type(model).__name__}. Name attention layers.")
    for name, parameter in model.named_parameters():
        if name.startswith("score."):
            parameter.requires_grad_(True)


def require_targets(model: PreTrainedModel, section: LoraSection, where: str) -> list[str]:
    """The linear layers that can have adapters. Raises ModelError, which begins with `where`, if a target matches
    neither one of them nor a tensor of experts."""
    linear = linear_layers(model)
    kinds = [*sorted(set(map(target_module, linear))), *sorted(set(map(target_tensor, expert_tensors(model))))]
    unknown = sorted(set(section.targets) - set(kinds))
    if not linear:
        raise ModelError(f"{where}: the model has no linear layers to adapt.")
    if unknown:
        raise ModelError(f"{where}: no linear layers called {', '.join(unknown)}; have {', '.join(kinds)}.")
    return linear


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapter of each adapted matrix or tensor of experts, by its name in the model without adapters."""
    parameters = dict(model.named_parameters())
    found = {}
    for name, down in parameters.items():
        if name.endswith(DOWN):
            layer = name.removesuffix(DOWN)
            module: Any = model.get_submodule(layer)
            tensor, experts = "weight", None
            if is_tensor_adapter(module):
                tensor, experts = (
                    module.parameter_name,
                    Experts(module.num_experts, not module._did_swap_in_out_features),
                )
            adapter = Adapter(layer, down, parameters[layer + UP], float(module.scaling[NAME]), experts)
            found[f"{plain_name(layer)}.{tensor}"] = adapter
    return found


def frozen_digest(model: nn.Module) -> torch.Tensor:
    """XXH3-128, as 16 bytes, of this rank's part of all frozen parameters."""
    digest = xxhash.xxh3_128()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            digest.update(local_shard(parameter).cpu().contiguous().view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def gathered_adapters(model: nn.Module) -> dict[str, LoraMatrices]:
    """Every full adapter, on every rank, by the name of what it adapts. Empty if a head was trained too: the adapters
    alone are not the trained model then. Collective under ZeRO-3."""
    if any(p.requires_grad and plain_name(name) is not None for name, p in model.named_parameters()):
        return {}
    return {name: adapter.gathered() for name, adapter in adapters_of(model).items()}


def write_adapters(adapters: Mapping[str, LoraMatrices], section: LoraSection, base: Path, directory: Path) -> None:
    """Write adapters to a folder that peft can load on top of the model in the folder `base`."""
    import peft  # noqa: PLC0415

    directory.mkdir(exist_ok=True)
    config = peft.LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        target_modules=sorted({target_module(one.layer) for one in adapters.values() if one.experts is None}),
        target_parameters=sorted({target_tensor(name) for name, one in adapters.items() if one.experts is not None}),
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    config.save_pretrained(directory)
    weights: dict[str, torch.Tensor] = {}
    for gathered in adapters.values():
        down, up = names_in_file(gathered.layer)
        weights |= {down: gathered.down.cpu(), up: gathered.up.cpu()}
    save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
