"""How libraries that make a million objects are imported, and what to install where they are missing."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

TRAINING_LIBRARIES = frozenset({
    "accelerate", "aiohttp", "datasets", "deepspeed", "huggingface_hub", "math_verify", "peft", "pyarrow", "ray",
    "safetensors", "sympy", "tensorboard", "tokenizers", "torch", "tqdm", "transformers", "vllm", "xxhash",
})  # fmt: skip
"""Top-level modules that come with the extras `cpu` and `gpu`, and not with a plain install."""


@contextmanager
def importing() -> Iterator[None]:
    """Do not collect garbage while an import inside goes on. Nothing that modules are made of is garbage, and Python
    would look through all of it again each time that it has grown by a quarter: a fifth of the time that imports of
    torch, transformers, DeepSpeed or vLLM take."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def missing_extra(error: BaseException) -> str | None:
    """What to install after an import failed for want of the training libraries. None for any other error."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    library = (error.name or "").partition(".")[0]
    if library not in TRAINING_LIBRARIES:
        return None
    return (
        f"{library} is not installed, and this command needs it. Run `pip install 'rlhf[cpu]'`, or on a machine with "
        "GPUs `pip install 'rlhf[gpu]'`."
    )
