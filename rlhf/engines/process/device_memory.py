"""The GPU of this process, where it has one: whether, and its memory."""

import gc

import torch


def local_device() -> str:
    """cuda where this machine has a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_memory() -> None:
    """Give back what forgotten models held."""
    gc.collect()
    give_back()


def give_back() -> None:
    """Leave to other processes on the GPU what torch keeps for later and nothing uses now."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_device_memory() -> int:
    """Bytes of the GPU that torch has reserved at most; 0 without one."""
    return torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
