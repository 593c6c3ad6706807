"""Exports a trained model in Hugging Face format, and verifies that the export loads as the trained weights.

An export has the names and tensors of the checkpoint that was loaded: parameters and persistent buffers, each as
transformers stores it. Experts that are one tensor in memory, for example, are a tensor each on disk.
"""

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import PreTrainedModel

from rlhf.config.models import LoraSection
from rlhf.engines.models.adapter_names import plain_name
from rlhf.engines.models.adapters import adapters_of, gathered_adapters, write_adapters
from rlhf.engines.models.four_bit import four_bit_layers, full_weight
from rlhf.engines.models.loading import CARRIED_FILES, LoadedModel, LoadingInfo
from rlhf.engines.process.distributed import deepspeed
from rlhf.engines.training.stored_model import write_config, write_weights
from rlhf.engines.training.write_errors import WriteErrors, tensor_bytes
from rlhf.errors import ModelError

SHOWN = 3


def export_model(loaded: LoadedModel, directory: Path, lora: LoraSection) -> None:
    """Write weights (with LoRA adapters merged), config, and the other files of the model as they are to `directory`,
    and the unmerged adapters to its folder `adapter`. Collective; rank 0 holds the full model in host memory.

    Raises:
        CheckpointError: on every rank, if the disk could not be written.
    """
    errors = WriteErrors()
    is_writer = dist.get_rank() == 0
    weights = {name: tensor.cpu().clone() for name, tensor in _whole_tensors(loaded.model) if is_writer}
    adapters = gathered_adapters(loaded.model)
    if is_writer:
        with errors.collected(directory / "model.safetensors", tensor_bytes(weights)):
            directory.mkdir(parents=True, exist_ok=True)
            write_weights(loaded.model, weights, directory)
            write_config(loaded.model, loaded.dropouts, directory)
            for pattern in CARRIED_FILES:
                for source in loaded.folder.glob(pattern):
                    target = directory / source.relative_to(loaded.folder)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(source, target)
            if adapters:
                write_adapters(adapters, lora, loaded.folder, directory / "adapter")
    errors.raise_if_any(str(directory))


def check_export(loaded: LoadedModel, directory: Path, *, where: str) -> None:
    """Load `directory` as a user would, and compare every tensor with the model, bit for bit. Collective; rank 0 holds
    the full model in host memory.

    Raises ModelError, on rank 0, that begins with `where` and names the tensors that are missing, unexpected or
    different.
    """
    stored, problems = _loaded_again(type(loaded.model), directory) if dist.get_rank() == 0 else ({}, [])
    for name, tensor in _whole_tensors(loaded.model):
        if dist.get_rank() == 0 and not problems and not _is_same(stored.get(name), tensor):
            problems.append(f"{name} differs")
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ModelError(
            f"{where}: an export of this {type(loaded.model).__name__} does not load as the model that is trained: "
            f"{'; '.join(problems[:SHOWN])}{more}. It cannot be trained here."
        )


def _loaded_again(kind: type[PreTrainedModel], directory: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Every tensor that transformers loads from a folder, and what it reports as missing or unexpected."""
    try:
        found = kind.from_pretrained(directory, dtype="auto", use_safetensors=True, output_loading_info=True)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        return {}, [str(error).splitlines()[0]]
    model, info = cast(tuple[PreTrainedModel, LoadingInfo], found)
    problems = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    problems += [f"{name} is unexpected" for name in sorted(info["unexpected_keys"])]
    problems += [f"{name} has another shape" for name, _, _ in sorted(info["mismatched_keys"])]
    tensors = model.state_dict()
    del found, model
    gc.collect()
    return tensors, problems


def _is_same(stored: torch.Tensor | None, tensor: torch.Tensor) -> bool:
    return stored is not None and stored.dtype == tensor.dtype and torch.equal(stored, tensor.cpu())


@torch.no_grad()
def _whole_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every full parameter and persistent buffer under its name in the model without adapters, tied ones once, adapters
    merged; under ZeRO-3 parameters are gathered one at a time."""
    adapters, four_bit = adapters_of(model), four_bit_layers(model)
    for inner_name, parameter in model.named_parameters():
        name = plain_name(inner_name)
        if name is None:
            continue
        gathered = adapters[name].gathered() if name in adapters else None
        with deepspeed.zero.GatheredParameters([parameter]):
            whole = full_weight(four_bit.get(inner_name), parameter)
            yield name, whole if gathered is None else gathered.merged_into(whole)
    persistent = model.state_dict().keys()
    for inner_name, buffer in model.named_buffers():
        name = plain_name(inner_name)
        if name is not None and inner_name in persistent:
            yield name, buffer.detach()
