"""Names that peft gives to LoRA matrices, in a model and in a file, and what can have adapters: linear layers, and
tensors that hold all experts of a layer."""

import re
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from rlhf.engines.models.text_part import text_backbone

NAME = "default"
"""Peft's name for the only adapter of a model."""
EXPERT = re.compile(r"\bexperts\.\d+\.")
WRAPPED = re.compile(r"(\.base_layer)+(?=\.|$)")
EXPERT_TENSOR_DIMS = 3
DOWN, UP = f".lora_A.{NAME}.weight", f".lora_B.{NAME}.weight"
FILE_PREFIX = "base_model.model."
FILE_DOWN, FILE_UP = ".lora_A.weight", ".lora_B.weight"


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers of a model's backbone, without the output layer (logits or scores)."""
    backbone = set(text_backbone(model).modules())
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer in backbone]


def expert_tensors(model: PreTrainedModel) -> list[str]:
    """Names of the tensors [experts, ..., ...] of a model's backbone, each of which holds a matrix of every expert of a
    layer."""
    backbone = set(text_backbone(model).parameters())
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == EXPERT_TENSOR_DIMS
        and len(parameter) > 1
        and name.split(".")[-2] == "experts"
        and parameter in backbone
    ]


def adapted_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that hold adapted expert tensors with all their adapters, by their names. Peft merges the adapters
    while such a module runs, so all that is in it must be there then."""
    for name, module in model.named_modules():
        if is_tensor_adapter(module) and not name.endswith(".base_layer"):
            yield name, module


def is_tensor_adapter(module: nn.Module) -> bool:
    """Whether a module is peft's wrapper of one tensor. By its name: peft is imported only where there are adapters."""
    return type(module).__name__ == "ParamWrapper"


def target_module(layer: str) -> str:
    """Peft's target module of a layer: `q_proj` for `model.layers.0.self_attn.q_proj`."""
    return layer.rpartition(".")[2]


def target_tensor(tensor: str) -> str:
    """Peft's target parameter of a tensor: `experts.down_proj` for `model.layers.0.mlp.experts.down_proj`."""
    return ".".join(tensor.split(".")[-2:])


def plain_name(name: str) -> str | None:
    """A parameter's name in the model without adapters; None for an adapter's own parameters."""
    return None if name.endswith((DOWN, UP)) else WRAPPED.sub("", name)


def may_stay_unchanged(name: str) -> bool:
    """Whether a first update may leave this parameter unchanged: A has no gradient while B is 0; and an expert that is
    a module of its own may have got no token."""
    return name.endswith(DOWN) or EXPERT.search(name) is not None


def names_in_file(layer: str) -> tuple[str, str]:
    """Names of a layer's A and B in an adapter file."""
    return f"{FILE_PREFIX}{layer}{FILE_DOWN}", f"{FILE_PREFIX}{layer}{FILE_UP}"


def layer_in_file(name: str) -> str:
    """The layer that a matrix of this name in an adapter file adapts."""
    return name.removeprefix(FILE_PREFIX).removesuffix(FILE_DOWN).removesuffix(FILE_UP)
