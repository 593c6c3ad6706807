"""Models that read more than text (images, sound): their class in transformers, and the part of them that learns.

Such a model is loaded, sent and exported whole. Text goes through its decoder alone; towers for other inputs and what
joins them to the decoder get no gradient from text, so they are frozen.
"""

from typing import TypeAlias

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

AutoClass: TypeAlias = type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]


def language_model_class(config: PretrainedConfig) -> AutoClass:
    """The class of transformers that loads a checkpoint whole. `AutoModelForCausalLM` leaves the towers of some
    families out (Qwen3.5), and does not know others (Mistral 3)."""
    names = config.architectures or ()
    reads_images = type(config) in AutoModelForImageTextToText._model_mapping
    is_text_alone = any(name.endswith("ForCausalLM") for name in names)
    return AutoModelForImageTextToText if reads_images and not is_text_alone else AutoModelForCausalLM


def is_composite(model: PreTrainedModel) -> bool:
    """Whether a model has a config for its text part."""
    return model.config.get_text_config() is not model.config


def text_backbone(model: PreTrainedModel) -> nn.Module:
    """The layers that text goes through, without the output layer."""
    found: nn.Module = model.get_decoder() if is_composite(model) else model.base_model
    return found


def freeze_other_parts(model: PreTrainedModel) -> None:
    """Freeze, in place, what is neither the text's backbone nor an output layer."""
    if not is_composite(model):
        return
    text = set(text_backbone(model).parameters())
    for name, parameter in model.named_parameters():
        if parameter not in text and not name.startswith(("lm_head.", "score.")):
            parameter.requires_grad_(False)
