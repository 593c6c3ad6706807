"""How a model on disk becomes one model on many ranks: rank 0 reads it, and the others get it parameter by parameter.

Elsewhere a parameter that has not come yet has its shape and no memory (torch's meta device). So each file is read
once, the host memory of one process holds the whole model, and under ZeRO-3 no device holds more of it than its own
part and the module that is under way.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from rlhf.config.models import ModelSection
from rlhf.engines.models.four_bit import FourBitLinear, hold_in_four_bits
from rlhf.engines.models.loading import LoadedModel, load_model, sketch_model
from rlhf.engines.process.distributed import deepspeed
from rlhf.errors import ModelError
from rlhf.types import Head

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one parameter of a model belongs; those with one owner are one parameter."""

    owner: str
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Outline:
    """All of a loaded model but the numbers in its parameters."""

    places: Mapping[str, Place]
    tensors: Mapping[tuple[str, str], torch.Tensor]
    """Buffers and other tensors that modules hold, by the names of module and attribute."""


def read_once(
    section: ModelSection, name: str, head: Head, *, where: str, device: torch.device, seed: int, new_head: bool
) -> LoadedModel:
    """As `load_model`, for the whole process group: parameters have numbers on rank 0 only, until `replicate` or
    `partition`. Collective; raises rank 0's ModelError on every rank."""
    message: list[Outline | ModelError | None] = [None]
    if dist.get_rank() == 0:
        try:
            loaded = load_model(section, name, head, where=where, device=device, seed=seed, new_head=new_head)
            message = [_outline(loaded.model)]
        except ModelError as error:
            message = [error]
    else:
        loaded = sketch_model(section, name, head, where=where, device=device, new_head=new_head)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(message)
    (outline,) = message
    if isinstance(outline, ModelError):
        raise outline
    if dist.get_rank() != 0:
        assert outline is not None
        _update_ema(loaded.model, outline)
    if section.quantization == "nf4":
        hold_in_four_bits(loaded.model)
    return loaded


def replicate(model: nn.Module, device: torch.device) -> None:
    """Put all of `model` on every rank's device. Collective; `model` is what `read_once` gave, or holds that."""
    for module in model.modules():
        _pack(module, device)
    for parameter in model.parameters():
        _come_to(parameter, device)
        _give(parameter.data)
    _bring_tensors(model, device)


def partition(model: nn.Module, device: torch.device, config: Mapping[str, object]) -> None:
    """Put each rank's part of `model` on its device, as DeepSpeed's `config` of ZeRO-3 says. Collective; `model` as
    for `replicate`."""
    # Children first: DeepSpeed takes a module with all that it holds, and passes over what it has taken before.
    for module in reversed(list(model.modules())):
        _pack(module, device)
        own = list(module.parameters(recurse=False))
        for parameter in own:
            if not hasattr(parameter, "ds_id"):
                _come_to(parameter, device)
        if own:
            deepspeed.zero.Init(module=module, config_dict_or_path=config)
    _bring_tensors(model, device)


def _outline(model: nn.Module) -> Outline:
    owners: dict[nn.Parameter, str] = {}
    places = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(parameter, name)
        places[name] = Place(owner, parameter.shape, parameter.dtype)
    return Outline(places, {key: tensor.cpu() for key, tensor in _tensors(model).items()})


def _update_ema(model: nn.Module, outline: Outline) -> None:
    """Give a sketch the shapes, dtypes and ties that the loaded model has, and its tensors that are no parameters."""
    fresh: dict[str, nn.Parameter] = {}
    for name, place in outline.places.items():
        holder, _, leaf = name.rpartition(".")
        if place.owner not in fresh:
            empty = torch.empty(place.shape, dtype=place.dtype, device=META)
            fresh[place.owner] = nn.Parameter(empty, requires_grad=place.dtype.is_floating_point)
        setattr(model.get_submodule(holder), leaf, fresh[place.owner])
    for (holder, leaf), tensor in outline.tensors.items():
        setattr(model.get_submodule(holder), leaf, tensor)


def _tensors(model: nn.Module) -> dict[tuple[str, str], torch.Tensor]:
    """What modules hold beside parameters: buffers, and tensors that they keep as plain attributes."""
    return {
        (name, leaf): tensor
        for name, module in model.named_modules()
        for leaf, tensor in [*module.named_buffers(recurse=False), *vars(module).items()]
        if isinstance(tensor, torch.Tensor)
    }


def _bring_tensors(model: nn.Module, device: torch.device) -> None:
    for (name, leaf), tensor in _tensors(model).items():
        setattr(model.get_submodule(name), leaf, tensor.to(device))


def _pack(module: nn.Module, device: torch.device) -> None:
    """Before anything of it travels: what is in 4 bits goes out in 4 bits."""
    if isinstance(module, FourBitLinear):
        module.pack(device)


def _come_to(parameter: nn.Parameter, device: torch.device) -> None:
    """Let a parameter have memory on `device`, with its numbers where this rank has them."""
    if parameter.device != META:
        parameter.data = parameter.data.to(device)
        return
    here = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
    # The object stays, which optimizers and other modules know.
    torch.utils.swap_tensors(parameter, here)  # type: ignore[no-untyped-call]


def _give(numbers: torch.Tensor) -> None:
    """Rank 0's numbers to all. As bytes, which every backend can send."""
    if dist.get_world_size() > 1:
        dist.broadcast(numbers.view(-1).view(torch.uint8), src=0)
