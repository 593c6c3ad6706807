"""Gradient checkpointing (Chen et al. 2016): a layer's activations are computed again in the backward pass, from its
inputs, which are kept on the device or in host memory."""

from collections.abc import Callable
from functools import partial

from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf.config.models import TrainedModelSection
from rlhf.errors import ModelError

FUNCTION = "_gradient_checkpointing_func"
"""The attribute in which transformers' layers have the function that checkpoints them."""


def checkpoint_layers(model: PreTrainedModel, section: TrainedModelSection, where: str, *, on_gpu: bool) -> None:
    """Compute the layers of `model` again in the backward pass, if the section says so. Raises ModelError, which begins
    with the setting of the role of `where` (policy.model), if the model has code of its own for it that knows no
    checkpoints, or none in host memory."""
    if not section.gradient_checkpointing:
        return
    setting, kind = f"{where.rpartition('.')[0]}.gradient_checkpointing".lstrip("."), type(model).__name__
    if not model.supports_gradient_checkpointing:
        raise ModelError(f"{setting}: a {kind} does not support it. Set false.")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if section.gradient_checkpointing != "offload":
        return
    layers = [module for module in model.modules() if FUNCTION in vars(module)]
    if not layers:
        raise ModelError(f"{setting}: a {kind} decides by itself where its layers keep their inputs. Set true.")
    for layer in layers:
        setattr(layer, FUNCTION, partial(_offloaded, on_gpu=on_gpu))


def _offloaded(layer: Callable[..., object], *inputs: object, on_gpu: bool) -> object:
    """What `layer` gives of `inputs`, of which tensors are kept in host memory. Page-locked memory lets the copies run
    beside the CPU; on a CPU tensors stay where they are."""
    with save_on_cpu(pin_memory=on_gpu):
        outputs: object = checkpoint(layer, *inputs, use_reentrant=False)
    return outputs
