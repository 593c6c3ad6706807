"""The process group of the ranks that share a model, and DeepSpeed set up for the right kind of device.

DeepSpeed chooses its device when it is imported, so every other module imports it from here.
"""

import gc
import logging
import os
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.utils import logger as deepspeed_logger

deepspeed_logger.setLevel(logging.ERROR)
# DeepSpeed calls collectives by names that torch has deprecated.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
# Its shared-memory all-reduce must be compiled on first use (a minute, and a compiler), works on one node only, and
# leaves files in /dev/shm when a process is killed. Gloo does the same work.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

__all__ = ["deepspeed", "init_distributed", "torch_device"]


def init_distributed(rank: int, world_size: int, store: Store, *, device: str, timeout_s: float) -> None:
    """Join the default process group: gloo on CPU, NCCL on CUDA. Blocks until all ranks have joined, and raises after
    `timeout_s`, which is also the timeout of every collective."""
    # Modules stay. DeepSpeed collects garbage when an engine starts, and takes 0.4 s to look through theirs.
    gc.freeze()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    torch_device(device)
    dist.init_process_group(
        backend="gloo" if device == "cpu" else "nccl",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    deepspeed.init_distributed(dist_init_required=False, timeout=timedelta(seconds=timeout_s))


def torch_device(device: str) -> torch.device:
    """The CPU, or the one GPU that this process sees."""
    if device == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)
