"""Exports a trained model in Hugging Face format, and verifies that the export equals the trained weights."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import PreTrainedModel

from rlhf.config.models import LoraSection
from rlhf.engines.models.adapter_names import plain_name
from rlhf.engines.models.adapters import adapters_of, gathered_adapters, write_adapters
from rlhf.engines.models.four_bit import four_bit_layers, full_weight
from rlhf.engines.models.loading import TOKENIZER_FILES, WEIGHTS, LoadedModel
from rlhf.engines.process.distributed import deepspeed
from rlhf.engines.training.write_errors import WriteErrors
from rlhf.errors import CheckpointError


def export_model(loaded: LoadedModel, directory: Path, lora: LoraSection) -> None:
    """Write weights (with LoRA adapters merged), config and tokenizer to `directory`, and the unmerged adapters to its
    folder `adapter`. Collective; rank 0 holds the full model in host memory.

    Raises:
        CheckpointError: on every rank, if the disk could not be written.
    """
    errors = WriteErrors()
    is_writer = dist.get_rank() == 0
    weights = {name: tensor.cpu().clone() for name, tensor in _whole_parameters(loaded.model) if is_writer}
    adapters = gathered_adapters(loaded.model)
    if is_writer:
        with errors.collected():
            directory.mkdir(parents=True, exist_ok=True)
            loaded.model.save_pretrained(directory, state_dict=weights)
            config = copy.deepcopy(loaded.model.config)
            for name, rate in loaded.dropouts.items():
                setattr(config, name, rate)
            config.save_pretrained(directory)
            for pattern in TOKENIZER_FILES:
                for source in loaded.folder.glob(pattern):
                    shutil.copyfile(source, directory / source.name)
            if adapters:
                write_adapters(adapters, lora, loaded.folder, directory / "adapter")
    errors.raise_if_any(str(directory))


def check_export(loaded: LoadedModel, directory: Path) -> None:
    """Compare every tensor in `directory` with the model, bit for bit, one at a time. Collective.

    Raises CheckpointError, on rank 0, that names the tensors that are missing, unexpected or different.
    """
    stored: dict[str, Path] = {}
    for path in sorted(directory.glob(WEIGHTS)):
        with safe_open(path, framework="pt") as file:
            stored |= dict.fromkeys(file.keys(), path)
    problems = []
    for name, tensor in _whole_parameters(loaded.model):
        if dist.get_rank() != 0:
            continue
        if name not in stored:
            problems.append(f"{name} is missing")
            continue
        with safe_open(stored.pop(name), framework="pt") as file:
            if not torch.equal(file.get_tensor(name), tensor.cpu()):
                problems.append(f"{name} differs")
    if dist.get_rank() == 0:
        problems += [f"{name} belongs to no parameter" for name in sorted(stored)]
        if problems:
            raise CheckpointError(f"{directory}: not the trained model: {'; '.join(problems)}")


@torch.no_grad()
def _whole_parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every full parameter under its Hugging Face name, tied ones once, adapters merged; under ZeRO-3 gathered one at a
    time."""
    adapters, four_bit = adapters_of(model), four_bit_layers(model)
    for inner_name, parameter in model.named_parameters():
        name = plain_name(inner_name)
        if name is None:
            continue
        gathered = adapters[name].gathered() if name in adapters else None
        with deepspeed.zero.GatheredParameters([parameter]):
            whole = full_weight(four_bit.get(inner_name), parameter)
            yield name, whole if gathered is None else gathered.merged_into(whole)
