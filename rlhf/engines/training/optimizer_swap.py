"""Keeps the optimizer state in host memory except during a step, to free memory of a GPU that other models share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlhf.engines.process.distributed import deepspeed


class OptimizerSwap:
    """Swaps Adam's moments and ZeRO-3's float32 weights, 12 bytes for each parameter that a rank updates, between host
    memory and the GPU. The copies are exact. On CPU nothing is moved."""

    def __init__(self, engine: "deepspeed.DeepSpeedEngine", optimizer: torch.optim.Optimizer) -> None:
        self._engine = engine
        self._optimizer = optimizer
        self._host_copies: dict[int, torch.Tensor] = {}
        self._to_host()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside this block the optimizer state is on the device, where a step needs it."""
        for tensor in self._tensors():
            tensor.data = tensor.to(self._engine.device, non_blocking=True)
        try:
            yield
        finally:
            self._to_host()

    def _to_host(self) -> None:
        moved = [(index, tensor) for index, tensor in enumerate(self._tensors()) if tensor.device.type != "cpu"]
        if not moved:
            return
        for index, tensor in moved:
            if index not in self._host_copies:
                self._host_copies[index] = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._host_copies[index].copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()
        for index, tensor in moved:
            tensor.data = self._host_copies[index]
        torch.cuda.empty_cache()

    def _tensors(self) -> list[torch.Tensor]:
        """Every tensor that is swapped, in a fixed order: weights first, then moments, which the first step creates.
        Adam's step counts are scalars and stay where they are."""
        weights = self._engine.optimizer.fp32_partitioned_groups_flat
        states = self._optimizer.state.values()
        return [*weights, *(part for state in states for part in state.values() if torch.is_tensor(part) and part.ndim)]
