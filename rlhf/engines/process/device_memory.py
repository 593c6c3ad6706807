"""Whether this process has a GPU, and the memory of that GPU."""

import gc

import torch


def local_device() -> str:
    """cuda where this machine has a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_memory() -> None:
    """Collect models that are no longer referenced, and release the memory that they held."""
    gc.collect()
    empty_cache()


def empty_cache() -> None:
    """Release the memory that torch caches and no tensor uses, so that other processes on the GPU can have it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_device_memory() -> int:
    """The most bytes of GPU memory that torch has reserved so far; 0 without a GPU."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
