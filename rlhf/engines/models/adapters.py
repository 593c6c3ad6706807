"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): two small trainable matrices for each frozen matrix W.

The layers are peft's. Rollout engines and exports get the merged matrix, W + scale * B @ A, under the names of the
model without adapters.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from rlhf.config.models import LoraSection
from rlhf.engines.models.adapter_names import DOWN, NAME, UP, linear_layers, names_in_file, plain_name, target_module
from rlhf.engines.models.finite_weights import local_shard
from rlhf.engines.process.distributed import deepspeed
from rlhf.errors import ModelError


@dataclass(frozen=True, slots=True)
class LoraMatrices:
    """An adapter's full matrices: `down` is A [rank, in], `up` is B [out, rank]."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def merged_into(self, matrix: torch.Tensor) -> torch.Tensor:
        """`matrix` [out, in] with the adapter merged: computed in float32, returned in the matrix's dtype."""
        delta = (self.up.to(matrix.device).float() @ self.down.to(matrix.device).float()).mul_(self.scale)
        return delta.add_(matrix.float()).to(matrix.dtype)


@dataclass(frozen=True, slots=True)
class Adapter:
    """The trainable parameters that adapt one matrix."""

    down: nn.Parameter
    up: nn.Parameter
    scale: float

    @torch.no_grad()
    def gathered(self) -> LoraMatrices:
        """Full copies of both matrices, on every rank. Collective under ZeRO-3."""
        with deepspeed.zero.GatheredParameters([self.down, self.up]):
            return LoraMatrices(self.down.detach().clone(), self.up.detach().clone(), self.scale)


def add_adapters(model: PreTrainedModel, section: LoraSection, *, seed: int, where: str) -> None:
    """Freeze `model` in place and add adapters to the linear layers of its backbone. A `score` head stays trainable.

    B starts at 0, so the model's outputs do not change; `seed` decides A. Raises ModelError, which begins with `where`
    (policy.lora.targets), if a target matches no layer.
    """
    import peft  # noqa: PLC0415  - takes seconds, and most runs have no adapters

    linear = require_targets(model, section, where)
    chosen = [name for name in linear if not section.targets or target_module(name) in section.targets]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # With dropout, two passes over the same tokens would give different log-probs.
        config = peft.LoraConfig(r=section.rank, lora_alpha=section.alpha, target_modules=chosen, lora_dropout=0.0)
        try:
            peft.inject_adapter_in_model(config, model, NAME)
        except ValueError as error:
            raise ModelError(f"{where}: peft cannot adapt these layers: {error}") from error
    if set(adapters_of(model)) != {f"{name}.weight" for name in chosen}:
        raise ModelError(f"{where}: peft adapts other layers of a {type(model).__name__}. Name attention layers.")
    for name, parameter in model.named_parameters():
        if name.startswith("score."):
            parameter.requires_grad_(True)


def require_targets(model: PreTrainedModel, section: LoraSection, where: str) -> list[str]:
    """The linear layers that can have adapters. Raises ModelError, which begins with `where`, if a target matches none
    of them."""
    linear = linear_layers(model)
    kinds = sorted({target_module(name) for name in linear})
    unknown = sorted(set(section.targets) - set(kinds))
    if not linear:
        raise ModelError(f"{where}: the model has no linear layers to adapt.")
    if unknown:
        fused = sorted({target_module(name) for name, p in model.named_parameters() if p.dim() == 3} & set(unknown))
        why = f" ({', '.join(fused)}: all experts of a layer in one tensor, which gets no adapters)" if fused else ""
        raise ModelError(f"{where}: no linear layers called {', '.join(unknown)}{why}; have {', '.join(kinds)}.")
    return linear


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapter of each adapted matrix, by the matrix's name in the model without adapters."""
    parameters = dict(model.named_parameters())
    found = {}
    for name, down in parameters.items():
        if name.endswith(DOWN):
            layer = name.removesuffix(DOWN)
            scales: dict[str, float] = model.get_submodule(layer).scaling  # type: ignore[assignment]
            found[f"{layer}.weight"] = Adapter(down, parameters[layer + UP], float(scales[NAME]))
    return found


def frozen_digest(model: nn.Module) -> torch.Tensor:
    """XXH3-128, as 16 bytes, of this rank's part of all frozen parameters."""
    digest = xxhash.xxh3_128()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            digest.update(local_shard(parameter).cpu().contiguous().view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def gathered_adapters(model: nn.Module) -> dict[str, LoraMatrices]:
    """Every full adapter, on every rank, by the name of its layer. Empty if a head was trained too: the adapters alone
    are not the trained model then. Collective under ZeRO-3."""
    if any(p.requires_grad and plain_name(name) is not None for name, p in model.named_parameters()):
        return {}
    return {name.removesuffix(".weight"): adapter.gathered() for name, adapter in adapters_of(model).items()}


def write_adapters(adapters: Mapping[str, LoraMatrices], section: LoraSection, base: Path, directory: Path) -> None:
    """Write adapters to a folder that peft can load on top of the model in the folder `base`."""
    import peft  # noqa: PLC0415

    directory.mkdir(exist_ok=True)
    config = peft.LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        target_modules=sorted({target_module(layer) for layer in adapters}),
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    config.save_pretrained(directory)
    weights: dict[str, torch.Tensor] = {}
    for layer, gathered in adapters.items():
        down, up = names_in_file(layer)
        weights |= {down: gathered.down.cpu(), up: gathered.up.cpu()}
    save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
