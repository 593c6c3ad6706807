"""Loads one model onto many ranks: rank 0 reads it from disk and broadcasts it parameter by parameter.

On the other ranks a parameter is on torch's meta device (a shape without memory) until it is broadcast. So each file is
read once, only one process holds the full model in host memory, and under ZeRO-3 no device holds more than its own
shards and the module that is being partitioned.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from rlhf.config.models import ModelSection
from rlhf.engines.models.adapter_names import adapted_tensors
from rlhf.engines.models.chunked_mlp import chunked_layers
from rlhf.engines.models.four_bit import FourBitLinear, use_four_bit_layers
from rlhf.engines.models.loading import LoadedModel, build_meta_model, load_model
from rlhf.engines.models.routers import expert_lists
from rlhf.engines.process.distributed import deepspeed
from rlhf.errors import ModelError
from rlhf.types import Head

META = torch.device("meta")
CONVERSIONS = "_weight_conversions"
"""The attribute in which a model that transformers loaded keeps them."""


@dataclass(frozen=True, slots=True)
class ParameterLayout:
    """Shape and dtype of one parameter; names with the same `owner` are tied to one parameter."""

    owner: str
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """Everything about a loaded model except the values of its parameters."""

    parameters: Mapping[str, ParameterLayout]
    tensors: Mapping[tuple[str, str], torch.Tensor]
    """Buffers and other tensors that modules hold, by (module name, attribute name)."""
    conversions: object
    """How transformers converted the checkpoint's tensors, which it undoes to store them. A model on the meta device
    does not know it."""


def load_on_rank_zero(
    section: ModelSection, name: str, head: Head, *, where: str, device: torch.device, seed: int, new_head: bool
) -> LoadedModel:
    """As `load_model`, for the whole process group: until `replicate` or `partition` is called, only rank 0 has the
    values of the parameters. Collective; raises rank 0's ModelError on every rank."""
    message: list[ModelLayout | ModelError | None] = [None]
    if dist.get_rank() == 0:
        try:
            loaded = load_model(section, name, head, where=where, device=device, seed=seed, new_head=new_head)
            message = [_layout_of(loaded.model)]
        except ModelError as error:
            message = [error]
    else:
        loaded = build_meta_model(section, name, head, where=where, device=device, new_head=new_head)
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(message)
    (layout,) = message
    if isinstance(layout, ModelError):
        raise layout
    if dist.get_rank() != 0:
        assert layout is not None
        _apply_layout(loaded.model, layout)
    if section.quantization == "nf4":
        use_four_bit_layers(loaded.model)
    return loaded


def replicate(model: nn.Module, device: torch.device) -> None:
    """Put a full copy of `model` on every rank's device. Collective; `model` is the model that `load_on_rank_zero`
    returned, or a module that contains it."""
    for module in model.modules():
        _quantize(module, device)
    for parameter in model.parameters():
        _materialize(parameter, device)
        _broadcast(parameter.data)
    _move_tensors(model, device)


def partition(model: nn.Module, device: torch.device, config: Mapping[str, object], *, hpz_size: int) -> None:
    """Partition `model` over the ranks' devices, by DeepSpeed's ZeRO-3 `config`, and once more over each `hpz_size`
    consecutive ranks if that is above 1. Collective; `model` as for `replicate`."""
    hpz_group = _hpz_group(hpz_size) if hpz_size > 1 else None
    tensors = [name for name, _ in adapted_tensors(model)]
    if names := [*expert_lists(model), *chunked_layers(model), *tensors]:
        # Each gather needs all ranks, which use different experts, and have different numbers of chunks: all experts of
        # a layer, and what computes in chunks, are gathered at once; and so are tensors of experts with their adapters.
        deepspeed.utils.set_z3_leaf_modules_by_name(model, names)
    # Children first: DeepSpeed partitions a module with everything in it, and skips what is partitioned already.
    for module in reversed(list(model.modules())):
        _quantize(module, device)
        own = list(module.parameters(recurse=False))
        for parameter in own:
            if not hasattr(parameter, "ds_id"):
                _materialize(parameter, device)
        if own:
            deepspeed.zero.Init(module=module, config_dict_or_path=config, zero_param_parallel_group=hpz_group)
    _move_tensors(model, device)


def _hpz_group(size: int) -> object:
    """This rank's group of the second partition. DeepSpeed has one for all models of a process, which therefore have
    the same size."""
    groups = deepspeed.utils.groups
    if groups._get_zero_param_intra_parallel_group() is None:
        groups._create_zero_param_parallel_group(size)
    return groups._get_zero_param_intra_parallel_group()


def _layout_of(model: nn.Module) -> ModelLayout:
    owners: dict[nn.Parameter, str] = {}
    parameters = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = owners.setdefault(parameter, name)
        parameters[name] = ParameterLayout(owner, parameter.shape, parameter.dtype)
    tensors = {key: tensor.cpu() for key, tensor in _tensors(model).items()}
    return ModelLayout(parameters, tensors, vars(model).get(CONVERSIONS))


def _apply_layout(model: nn.Module, layout: ModelLayout) -> None:
    """Give a model on the meta device the shapes, dtypes and ties of the loaded model, and its tensors that are not
    parameters."""
    fresh: dict[str, nn.Parameter] = {}
    for name, parameter_layout in layout.parameters.items():
        holder, _, leaf = name.rpartition(".")
        if parameter_layout.owner not in fresh:
            empty = torch.empty(parameter_layout.shape, dtype=parameter_layout.dtype, device=META)
            fresh[parameter_layout.owner] = nn.Parameter(empty, requires_grad=parameter_layout.dtype.is_floating_point)
        setattr(model.get_submodule(holder), leaf, fresh[parameter_layout.owner])
    for (holder, leaf), tensor in layout.tensors.items():
        setattr(model.get_submodule(holder), leaf, tensor)
    setattr(model, CONVERSIONS, layout.conversions)


def _tensors(model: nn.Module) -> dict[tuple[str, str], torch.Tensor]:
    """Tensors of modules that are not parameters: buffers, and tensors in plain attributes."""
    return {
        (name, leaf): tensor
        for name, module in model.named_modules()
        for leaf, tensor in [*module.named_buffers(recurse=False), *vars(module).items()]
        if isinstance(tensor, torch.Tensor)
    }


def _move_tensors(model: nn.Module, device: torch.device) -> None:
    for (name, leaf), tensor in _tensors(model).items():
        setattr(model.get_submodule(name), leaf, tensor.to(device))


def _quantize(module: nn.Module, device: torch.device) -> None:
    """Quantize before the broadcast, so that 4-bit weights are also sent in 4 bits."""
    if isinstance(module, FourBitLinear):
        module.quantize(device)


def _materialize(parameter: nn.Parameter, device: torch.device) -> None:
    """Give a parameter memory on `device`, and its values if this rank has them."""
    if parameter.device != META:
        parameter.data = parameter.data.to(device)
        return
    empty = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
    # Swapped in place: optimizers and other modules keep references to this object.
    torch.utils.swap_tensors(parameter, empty)


def _broadcast(values: torch.Tensor) -> None:
    """Send rank 0's values to all ranks. As bytes, which every backend supports."""
    if dist.get_world_size() > 1:
        dist.broadcast(values.view(-1).view(torch.uint8), src=0)
