"""Exports a trained model in Hugging Face format, and verifies that the export loads as the trained weights.

An export has the names and tensors of the checkpoint that was loaded: parameters and persistent buffers, each as
transformers stores it. Experts that are one tensor in memory, for example, are a tensor each on disk.
"""

import gc
import shutil
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from transformers import PreTrainedModel

from rlhf.config.models import LoraSection
from rlhf.engines.models.adapters import gathered_adapters, write_adapters
from rlhf.engines.models.loading import CARRIED_FILES, LoadedModel, LoadingInfo
from rlhf.engines.training.held_tensors import held_tensors
from rlhf.engines.training.stored_model import write_config, write_weights
from rlhf.engines.training.write_errors import WriteErrors
from rlhf.errors import ModelError

SHOWN = 3


def export_model(loaded: LoadedModel, directory: Path, lora: LoraSection) -> None:
    """Write weights (with LoRA adapters merged), config, and the other files of the model as they are to `directory`,
    and the unmerged adapters to its folder `adapter`. Collective; rank 0 writes, file by file (`write_weights`).

    Raises:
        CheckpointError: on every rank, if the disk could not be written.
    """
    errors = WriteErrors()
    is_writer = dist.get_rank() == 0
    adapters = gathered_adapters(loaded.model)
    if is_writer:
        with errors.collected(directory / "config.json"):
            directory.mkdir(parents=True, exist_ok=True)
            write_config(loaded.model, loaded.dropouts, directory)
            for pattern in CARRIED_FILES:
                for source in loaded.folder.glob(pattern):
                    target = directory / source.relative_to(loaded.folder)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(source, target)
            if adapters:
                write_adapters(adapters, lora, loaded.folder, directory / "adapter")
    write_weights(loaded.model, held_tensors(loaded.model), directory, errors)
    errors.raise_if_any(str(directory))


def check_export(loaded: LoadedModel, directory: Path, *, where: str) -> None:
    """Load `directory` as a user would, and compare every tensor with the model, bit for bit. Collective.

    On rank 0 transformers maps the files: what it converts, such as experts, is in host memory, the rest is in the page
    cache, which gives way to what needs memory.

    Raises ModelError, on rank 0, that begins with `where` and names the tensors that are missing, unexpected or
    different.
    """
    stored, problems = _loaded_again(type(loaded.model), directory) if dist.get_rank() == 0 else ({}, [])
    for name, held in held_tensors(loaded.model).items():
        with held.whole() as tensor:
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
