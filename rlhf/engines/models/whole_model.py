"""Refuses a model that a command would sample from, before a rollout engine loads it."""

import os
from pathlib import Path

from safetensors import safe_open

from rlhf.config.engine_limits import EngineSizes, vllm_limit
from rlhf.config.json_file import ModelFileError
from rlhf.config.model_files import ModelFacts, local_folder, read_model
from rlhf.config.models import ModelSection
from rlhf.config.tokenizer_files import require_tokenizer
from rlhf.engines.models.finite_weights import is_finite
from rlhf.engines.models.loading import WEIGHTS, inspect_model, resolve_folder
from rlhf.errors import ConfigError, ModelError
from rlhf.types import Head

QUANTIZING = ("vllm",)
"""Rollout engines that load checkpoints whose weights are quantized."""


def require_whole_model(
    model: str, engine: str, *, where: str, device: str, dtype: str, tensor_parallel_size: int = 1
) -> ModelFacts:
    """What a language model's files say, if it can be sampled from by a rollout engine of the kind `engine` on `device`
    (cpu, cuda) in `dtype` (float32, bfloat16). A hub model is downloaded. Reads the weights once.

    Raises:
        ConfigError: vLLM does not support a size of the model, or `dtype` with it.
        ModelError: a file is missing or damaged, weights are missing, unexpected, of another shape or not finite, or
            the model needs code that is not run here. Begins with `where`.
    """
    try:
        folder = local_folder(model, os.environ) or resolve_folder(model, where=where)
        facts = read_model(folder)
        require_tokenizer(folder)
    except ModelFileError as error:
        raise ModelError(f"{where}: {error}") from error
    limit = None
    if engine == "vllm":
        limit = vllm_limit(facts, EngineSizes(tensor_parallel_size), on_cpu=device == "cpu", dtype=dtype)
    if limit is not None:
        raise ConfigError(f"--{limit.setting.replace('_', '-')}: {limit.text}")
    if facts.quantization is None or engine not in QUANTIZING:
        inspect_model(ModelSection(), str(folder), Head.LOG_PROBS, where=where, new_head=False)
    if facts.quantization is None:
        _require_finite_files(folder, where)
    return facts


def _require_finite_files(folder: Path, where: str) -> None:
    """Raise ModelError that names the weights in a folder that are not finite."""
    bad = []
    for path in sorted(folder.glob(WEIGHTS)):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  not a mapping
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and tensor.numel() and not is_finite(tensor):
                    bad.append(f"{where}: {name} in {path.name} holds values that are not finite.")
    if bad:
        raise ModelError(bad)
