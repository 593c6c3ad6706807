"""The EMA reference: an exponential moving average of the policy's weights, kept in the policy's own processes.

Every rank keeps the part that it holds under the ZeRO stage (its shard in stage 3, the full parameter below), in
float32 in host memory, so an update needs no communication. To run forward with the EMA weights, they are swapped with
the policy's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from rlhf.engines.process.distributed import deepspeed
from rlhf.errors import CheckpointError


class EmaCopy:
    """This rank's part of the EMA weights. Every method is collective."""

    def __init__(self, engine: "deepspeed.DeepSpeedEngine", zero_stage: int, decay: float) -> None:
        """Start with the policy's current weights; `decay` is the share of the EMA weights that an update keeps."""
        self._engine = engine
        self._is_sharded = zero_stage == 3
        self._decay = decay
        self._copy = {name: live.to("cpu", torch.float32, copy=True) for name, live in self._live()}

    @torch.no_grad()
    def update_ema(self) -> float:
        """Set ema = decay * ema + (1 - decay) * policy. Returns the norm of the change, over the whole model."""
        moved = torch.zeros((), dtype=torch.float64)
        for name, live in self._live():
            before = self._copy[name]
            self._copy[name] = self._decay * before + (1.0 - self._decay) * live.to("cpu", torch.float32)
            moved += (self._copy[name] - before).double().square().sum()
        total = moved.to(self._engine.device, torch.float32)
        if self._is_sharded:
            dist.all_reduce(total)
        return float(total.sqrt())

    @contextmanager
    def in_place_of_policy_weights(self) -> Iterator[None]:
        """Let the model compute with the EMA weights inside this block. Afterwards the policy's weights are restored
        bit for bit."""
        with self._released():
            policy = {name: live.to("cpu", copy=True) for name, live in self._live()}
            self._write(self._copy)
        try:
            yield
        finally:
            with self._released():
                self._write(policy)

    def save(self, directory: Path) -> None:
        """Write this rank's part; if every rank holds the full model, only rank 0 writes."""
        if self._is_sharded or dist.get_rank() == 0:
            save_file(self._copy, directory / self._file_name)

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote. Raises CheckpointError if it belongs to another model or another sharding."""
        path = directory / self._file_name
        if not path.exists():
            raise CheckpointError(f"{path}: missing; the run was saved without an EMA reference.")
        saved = load_file(path)
        wrong = sorted(
            name
            for name in saved.keys() | self._copy.keys()
            if name not in saved or name not in self._copy or saved[name].shape != self._copy[name].shape
        )
        if wrong:
            raise CheckpointError(f"{path}: holds another model, or another sharding of it ({wrong[0]}).")
        self._copy = saved

    @property
    def _file_name(self) -> str:
        return f"following_{dist.get_rank() if self._is_sharded else 0}.safetensors"

    def _live(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The trainable weights that this rank holds, in the tensors that the forward pass reads."""
        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            yield name, parameter.ds_tensor if self._is_sharded else parameter.data

    @torch.no_grad()
    def _write(self, weights: dict[str, torch.Tensor]) -> None:
        for name, live in self._live():
            live.copy_(weights[name])

    @contextmanager
    def _released(self) -> Iterator[None]:
        """Change shards safely inside this block. Under ZeRO-3 gathered parameters would go stale when their shards
        change: DeepSpeed releases them before, and afterwards gathers again those that it keeps unpartitioned."""
        if not self._is_sharded:
            yield
            return
        self._engine.optimizer.checkpoint_event_prologue()
        yield
        self._engine.optimizer.checkpoint_event_epilogue()
