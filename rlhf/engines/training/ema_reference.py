"""A reference that follows the policy: a second set of the policy's weights in the policy's own processes.

Every rank keeps its own part, as the ZeRO stage cuts it, in float32 in host memory: nothing is gathered to follow, and
what DeepSpeed writes (the shard under ZeRO-3, the whole parameter below) is what is read and written. To compute with
the copy, it changes places with the policy's weights.
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
    """This rank's part of the copy. Every method is collective."""

    def __init__(self, engine: "deepspeed.DeepSpeedEngine", zero_stage: int, decay: float) -> None:
        """Start as the policy is now; `decay` is the share that one `update_ema` keeps of the copy."""
        self._engine = engine
        self._is_sharded = zero_stage == 3
        self._decay = decay
        self._copy = {name: live.to("cpu", torch.float32, copy=True) for name, live in self._live()}

    @torch.no_grad()
    def update_ema(self) -> float:
        """Become decay * itself + (1 - decay) * the policy. Returns how far it moved: the norm of the change, over the
        whole model."""
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
    def in_place_of_policy(self) -> Iterator[None]:
        """Let the model compute with the copy inside this block, and with the policy's very bits after it."""
        with self._released():
            policy = {name: live.to("cpu", copy=True) for name, live in self._live()}
            self._write(self._copy)
        try:
            yield
        finally:
            with self._released():
                self._write(policy)

    def save(self, directory: Path) -> None:
        """Write this rank's part; where every rank holds the whole model, rank 0 writes it."""
        if self._is_sharded or dist.get_rank() == 0:
            save_file(self._copy, directory / self._file_name)

    def load(self, directory: Path) -> None:
        """Continue from what `save` wrote. Raises CheckpointError where it is of another model or another split."""
        path = directory / self._file_name
        if not path.exists():
            raise CheckpointError(f"{path}: missing; the run was saved without a reference that follows the policy.")
        saved = load_file(path)
        wrong = sorted(
            name
            for name in saved.keys() | self._copy.keys()
            if name not in saved or name not in self._copy or saved[name].shape != self._copy[name].shape
        )
        if wrong:
            raise CheckpointError(f"{path}: holds another model, or another split of it ({wrong[0]}).")
        self._copy = saved

    @property
    def _file_name(self) -> str:
        return f"following_{dist.get_rank() if self._is_sharded else 0}.safetensors"

    def _live(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights that this rank holds and that learn, where the forward pass takes them from."""
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
        """Under ZeRO-3 nothing that was gathered from the shards may outlive a change of the shards: DeepSpeed gives it
        up before and gathers anew, afterwards, what it keeps whole."""
        if not self._is_sharded:
            yield
            return
        self._engine.optimizer.checkpoint_event_prologue()
        yield
        self._engine.optimizer.checkpoint_event_epilogue()
