"""The optimizer's state on the host, but for the length of a step: room on a GPU that engines or other models share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlhf.engines.process.distributed import deepspeed


class OptimizerSwap:
    """Keeps Adam's moments and the float32 weights of ZeRO-3, 12 bytes of each parameter that a rank updates, in host
    memory. They cross to the GPU and back for each step; nothing is rounded on the way. On CPU there is no other
    memory, and nothing moves."""

    def __init__(self, engine: "deepspeed.DeepSpeedEngine", optimizer: torch.optim.Optimizer) -> None:
        self._engine = engine
        self._optimizer = optimizer
        self._homes: dict[int, torch.Tensor] = {}
        self._put_away()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, everything is where a step needs it."""
        for tensor in self._tensors():
            tensor.data = tensor.to(self._engine.device, non_blocking=True)
        try:
            yield
        finally:
            self._put_away()

    def _put_away(self) -> None:
        moved = [(index, tensor) for index, tensor in enumerate(self._tensors()) if tensor.device.type != "cpu"]
        if not moved:
            return
        for index, tensor in moved:
            if index not in self._homes:
                self._homes[index] = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._homes[index].copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()
        for index, tensor in moved:
            tensor.data = self._homes[index]
        torch.cuda.empty_cache()

    def _tensors(self) -> list[torch.Tensor]:
        """Everything that is swapped. Each keeps its place: moments appear in the first step, behind the weights. A
        count of steps is a number, and stays."""
        weights = self._engine.optimizer.fp32_partitioned_groups_flat
        states = self._optimizer.state.values()
        return [*weights, *(part for state in states for part in state.values() if torch.is_tensor(part) and part.ndim)]
