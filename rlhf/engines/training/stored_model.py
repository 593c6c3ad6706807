"""Writes weights and config of a model as the checkpoint that transformers would load again."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

MAX_SHARD = "50GB"
INDEX = "model.safetensors.index.json"


def write_weights(model: PreTrainedModel, tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Write `tensors`, which have the names that they have in `model`, under the names and in the shapes of a
    checkpoint. `model.save_pretrained` is not used: it also writes, and first judges, generation_config.json."""
    for pattern in model._keys_to_ignore_on_save or ():
        tensors.pop(pattern, None)
    stored = revert_weight_conversion(model, tensors)
    split = split_torch_state_dict_into_shards(
        stored, filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_SHARD
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: stored[name].contiguous() for name in names}
        save_file(shard, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_config(model: PreTrainedModel, dropouts: Mapping[str, float], directory: Path) -> None:
    """Write config.json, with the dropout rates that the model was loaded with."""
    content = json.loads(model.config.to_json_string(use_diff=True))
    content |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    restore_dropout(content, dropouts)
    (directory / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def restore_dropout(config: dict[str, object], dropouts: Mapping[str, float]) -> None:
    """Put rates back, in place; the name of one in a nested config is dotted: `text_config.attention_dropout`."""
    for name, rate in dropouts.items():
        section, (*path, leaf) = config, name.split(".")
        for part in path:
            inner = section.setdefault(part, {})
            assert isinstance(inner, dict)
            section = inner
        section[leaf] = rate
