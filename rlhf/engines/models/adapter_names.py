"""What peft calls the matrices of adapters, in a model and in a file, and the layers that they can stand beside."""

from torch import nn
from transformers import PreTrainedModel

NAME = "default"
"""What peft calls the one adapter that a model has."""
BESIDE = ".base_layer."
DOWN, UP = f".lora_A.{NAME}.weight", f".lora_B.{NAME}.weight"
FILE_PREFIX = "base_model.model."
FILE_DOWN, FILE_UP = ".lora_A.weight", ".lora_B.weight"


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers of a model's backbone; the layer that makes logits or scores is none of them."""
    backbone = set(model.base_model.modules())
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer in backbone]


def kind_of(layer: str) -> str:
    """What layers of the same place in every block are called: `q_proj` of `model.layers.0.self_attn.q_proj`."""
    return layer.rpartition(".")[2]


def plain_name(name: str) -> str | None:
    """What the model without adapters calls a parameter; None for an adapter's own."""
    return None if name.endswith((DOWN, UP)) else name.replace(BESIDE, ".")


def may_stand_still(name: str) -> bool:
    """Whether a first update may leave this parameter as it is: A has no gradient while B is 0."""
    return name.endswith(DOWN)


def names_in_file(layer: str) -> tuple[str, str]:
    """What a file of adapters calls A and B of a layer."""
    return f"{FILE_PREFIX}{layer}{FILE_DOWN}", f"{FILE_PREFIX}{layer}{FILE_UP}"


def layer_in_file(name: str) -> str:
    """The layer that a matrix of this name in a file stands beside."""
    return name.removeprefix(FILE_PREFIX).removesuffix(FILE_DOWN).removesuffix(FILE_UP)
