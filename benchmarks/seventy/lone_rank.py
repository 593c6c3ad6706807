"""A process group of many ranks of which one exists: rank 0, whose collectives return at once.

Of tensors that the ranks hold in parts, the parts of the others are zeros. What rank 0 sends arrives nowhere. Objects
that the ranks exchange are those of rank 0, once for each rank.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Work

from rlhf.engines.process.distributed import deepspeed

NAME = "lone"


def join(world_size: int) -> None:
    """Make this process rank 0 of `world_size` in the default process group, on a CPU."""
    os.environ.update(RANK="0", WORLD_SIZE=str(world_size), LOCAL_RANK="0")
    dist.Backend.register_backend(NAME, _create, devices=["cpu"])
    store = torch._C._distributed_c10d.HashStore()
    dist.init_process_group(NAME, store=store, rank=0, world_size=world_size)
    deepspeed.init_distributed(dist_init_required=False)


def _create(_store: object, rank: int, world_size: int, _timeout: object) -> "LoneRank":
    # Torch's stub demands a store, which its constructor does not take from a subclass.
    return LoneRank(rank, world_size)  # type: ignore[call-arg]


class _Done(Work):
    """A collective that is over."""

    def __init__(self, result: object) -> None:
        super().__init__()
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        self._future.set_result(result)

    def wait(self, timeout: object = None) -> bool:
        return True

    def get_future(self) -> Any:
        return self._future


class LoneRank(dist.ProcessGroup):
    """The collectives that a load, a step of training, a save and an export call, as torch's functions call them."""

    def getBackendName(self) -> str:  # noqa: N802
        return NAME

    def barrier(self, opts: object = None) -> _Done:
        del opts
        return _Done(None)

    def _start_coalescing(self, _device: torch.device) -> None:
        """Nothing is put off."""

    def _end_coalescing(self, _device: torch.device) -> _Done:
        return _Done(None)

    def allreduce(self, tensors: Sequence[torch.Tensor], _options: object = None) -> _Done:  # type: ignore[override]
        return _Done(tensors)

    def broadcast(self, tensors: Sequence[torch.Tensor], options: Any = None) -> _Done:  # type: ignore[override]
        if options is not None and options.rootRank:
            for tensor in tensors:
                tensor.zero_()
        return _Done(tensors)

    def allgather(  # type: ignore[override]
        self, outputs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], _options: object = None
    ) -> _Done:
        for parts, own in zip(outputs, inputs, strict=True):
            for part in parts:
                part.copy_(own)
        return _Done(outputs)

    def all_gather_single(self, output: torch.Tensor, own: torch.Tensor, _options: object = None) -> _Done:
        flat = output.view(-1)
        flat[: own.numel()].copy_(own.view(-1))
        flat[own.numel() :].zero_()
        return _Done(output)

    def all_gather_single_coalesced(
        self, outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], options: object = None
    ) -> _Done:
        for output, own in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, own, options)
        return _Done(outputs)

    def reduce_scatter_single(self, output: torch.Tensor, whole: torch.Tensor, _options: object = None) -> _Done:
        output.view(-1).copy_(whole.view(-1)[: output.numel()])
        return _Done(output)

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[torch.Tensor], wholes: Sequence[torch.Tensor], options: object = None
    ) -> _Done:
        for output, whole in zip(outputs, wholes, strict=True):
            self.reduce_scatter_single(output, whole, options)
        return _Done(outputs)
