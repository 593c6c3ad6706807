"""Writes weights and config of a model as the checkpoint that transformers would load again."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rlhf.engines.training.held_tensors import HeldTensor
from rlhf.engines.training.write_errors import WriteErrors
from rlhf.engines.weight_sync.conversion import conversion_groups

MAX_SHARD = 5_000_000_000
"""Bytes of the largest file of weights. Plans count two of them in the host memory of rank 0
(`rlhf.planning.memory.exporting`)."""
INDEX = "model.safetensors.index.json"


def write_weights(model: PreTrainedModel, held: Mapping[str, HeldTensor], directory: Path, errors: WriteErrors) -> None:
    """Write `held`, the tensors of `model`, under the names and in the shapes of a checkpoint. Collective.

    Rank 0 writes. It holds a file of at most `MAX_SHARD` in host memory, and what is converted together with the last
    tensor of it; a tensor that is larger is a file of its own. After a write error it writes nothing more, and still
    takes part. `model.save_pretrained` is not used: it takes all tensors at once, and writes, and first judges,
    generation_config.json.
    """
    ignored = model._keys_to_ignore_on_save or ()
    layouts = {name: one.layout for name, one in held.items() if name not in ignored}
    groups = conversion_groups(layouts, lambda tensors: revert_weight_conversion(model, dict(tensors)))
    shards = _Shards({name: tensor for group in groups for name, tensor in group.stored.items()}, directory, errors)
    is_writer = dist.get_rank() == 0
    for group in groups:
        keeps = is_writer and errors.first is None
        tensors: dict[str, torch.Tensor] = {}
        for name in group.held:
            with held[name].whole() as tensor:
                if keeps:
                    tensors[name] = tensor.detach().to("cpu", copy=True)
        if keeps:
            shards.add(revert_weight_conversion(model, tensors))
    if is_writer:
        shards.write_index()


class _Shards:
    """The files of a checkpoint, each written as soon as all of its tensors are there."""

    def __init__(self, layouts: Mapping[str, torch.Tensor], directory: Path, errors: WriteErrors) -> None:
        """`layouts` are the stored tensors on the meta device, in the order in which they will come."""
        self._directory = directory
        self._errors = errors
        self._split = split_state_dict_into_shards_factory(
            dict(layouts),
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=MAX_SHARD,
        )
        self._bytes_left = sum(tensor.nbytes for tensor in layouts.values())
        self._incomplete: dict[str, dict[str, torch.Tensor]] = {}

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over some tensors on the CPU, and write the files that they complete, until a write fails."""
        for name, tensor in tensors.items():
            file = self._split.tensor_to_filename[name]
            shard = self._incomplete.setdefault(file, {})
            shard[name] = tensor.contiguous()
            if len(shard) == len(self._split.filename_to_tensors[file]):
                self._write(file, self._incomplete.pop(file))

    def write_index(self) -> None:
        """Write which file holds which tensor, where there are several."""
        if self._split.is_sharded and self._errors.first is None:
            index = {"metadata": self._split.metadata, "weight_map": self._split.tensor_to_filename}
            with self._errors.collected(self._directory / INDEX):
                (self._directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _write(self, file: str, shard: dict[str, torch.Tensor]) -> None:
        if self._errors.first is not None:
            return
        with self._errors.collected(self._directory / file, self._bytes_left):
            save_file(shard, self._directory / file, metadata={"format": "pt"})
        self._bytes_left -= sum(tensor.nbytes for tensor in shard.values())


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
