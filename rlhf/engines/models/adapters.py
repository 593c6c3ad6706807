"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): beside each frozen matrix W, two small ones that learn.

The layers are peft's. Whoever sees the model from outside (engines that sample, an export) is given what it adds up to,
W + scale * B @ A, under the names that the model has without adapters.
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
from rlhf.engines.models.adapter_names import DOWN, NAME, UP, kind_of, linear_layers, names_in_file, plain_name
from rlhf.engines.models.finite_weights import own_part
from rlhf.engines.process.distributed import deepspeed
from rlhf.errors import ModelError


@dataclass(frozen=True, slots=True)
class Parts:
    """An adapter's matrices in full: `down` A [rank, in] and `up` B [out, rank]."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float

    def added_to(self, matrix: torch.Tensor) -> torch.Tensor:
        """`matrix` [out, in] with the adapter merged into it, computed in float32; in the matrix's dtype."""
        delta = (self.up.to(matrix.device).float() @ self.down.to(matrix.device).float()).mul_(self.scale)
        return delta.add_(matrix.float()).to(matrix.dtype)


@dataclass(frozen=True, slots=True)
class Adapter:
    """What learns beside one matrix."""

    down: nn.Parameter
    up: nn.Parameter
    scale: float

    @torch.no_grad()
    def parts(self) -> Parts:
        """Copies of both matrices, whole on every rank. Collective under ZeRO-3."""
        with deepspeed.zero.GatheredParameters([self.down, self.up]):
            return Parts(self.down.detach().clone(), self.up.detach().clone(), self.scale)


def add_adapters(model: PreTrainedModel, section: LoraSection, *, seed: int, where: str) -> None:
    """Freeze `model` in place, but for adapters beside the linear layers of its backbone and for a head that scores.

    B starts at 0, so that the model says what it said; A is drawn by `seed`. Raises ModelError, which begins with
    `where` (policy.lora.targets), where no layer has a name that was given.
    """
    import peft  # noqa: PLC0415  - takes seconds, and most runs have no adapters

    linear = linear_layers(model)
    kinds = sorted({kind_of(name) for name in linear})
    unknown = sorted(set(section.targets) - set(kinds))
    if not linear:
        raise ModelError(f"{where}: the model has no linear layers that adapters could stand beside.")
    if unknown:
        raise ModelError(f"{where}: no linear layers called {', '.join(unknown)}; have {', '.join(kinds)}.")
    chosen = [name for name in linear if not section.targets or kind_of(name) in section.targets]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Dropout would make log-probs that are measured twice disagree.
        config = peft.LoraConfig(r=section.rank, lora_alpha=section.alpha, target_modules=chosen, lora_dropout=0.0)
        try:
            peft.inject_adapter_in_model(config, model, NAME)
        except ValueError as error:
            raise ModelError(f"{where}: peft puts no adapters there: {error}") from error
    if set(adapters_of(model)) != {f"{name}.weight" for name in chosen}:
        raise ModelError(f"{where}: peft puts adapters elsewhere in a {type(model).__name__}. Name attention's layers.")
    for name, parameter in model.named_parameters():
        if name.startswith("score."):
            parameter.requires_grad_(True)


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapter beside each adapted matrix, by the name that the matrix has without it."""
    parameters = dict(model.named_parameters())
    found = {}
    for name, down in parameters.items():
        if name.endswith(DOWN):
            layer = name.removesuffix(DOWN)
            scales: dict[str, float] = model.get_submodule(layer).scaling  # type: ignore[assignment]
            found[f"{layer}.weight"] = Adapter(down, parameters[layer + UP], float(scales[NAME]))
    return found


def frozen_digest(model: nn.Module) -> torch.Tensor:
    """XXH3-128, as 16 bytes, of what this rank holds of everything that does not learn."""
    digest = xxhash.xxh3_128()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            digest.update(own_part(parameter).cpu().contiguous().view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def whole_adapters(model: nn.Module) -> dict[str, Parts]:
    """Every adapter, whole on every rank, by the name of its layer. Empty where a head learned beside them, without
    which they are not the trained model. Collective under ZeRO-3."""
    if any(p.requires_grad and plain_name(name) is not None for name, p in model.named_parameters()):
        return {}
    return {name.removesuffix(".weight"): adapter.parts() for name, adapter in adapters_of(model).items()}


def write_adapters(adapters: Mapping[str, Parts], section: LoraSection, base: Path, directory: Path) -> None:
    """Write adapters to a folder that peft loads over the model in the folder `base`."""
    import peft  # noqa: PLC0415

    directory.mkdir(exist_ok=True)
    config = peft.LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        target_modules=sorted({kind_of(layer) for layer in adapters}),
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    config.save_pretrained(directory)
    weights: dict[str, torch.Tensor] = {}
    for layer, parts in adapters.items():
        down, up = names_in_file(layer)
        weights |= {down: parts.down.cpu(), up: parts.up.cpu()}
    save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
