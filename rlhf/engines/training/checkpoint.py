"""Everything that a rank needs to continue bit for bit: DeepSpeed's shards, the step count and the random state.

Frozen weights are not written, only their digest, which detects a resume over other weights. No `latest` file is
written or read: the caller names the directory, after it has verified every file in it.
"""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from rlhf.engines.models.adapters import frozen_digest
from rlhf.engines.models.split_experts import num_holders
from rlhf.engines.process.distributed import deepspeed
from rlhf.engines.training.ema_reference import EmaCopy
from rlhf.engines.training.write_errors import WriteErrors, tensor_bytes
from rlhf.errors import CheckpointError

SHARDS = "deepspeed"
STATE = "state.json"
FROZEN = "frozen"
"""Key of the digest of this rank's frozen weights."""
STAGE = "zero_stage"
"""Key of the ZeRO stage that the ranks ran, which may differ from the config's."""
HOLDERS = "expert_parallel_size"
"""Key of the number of ranks that the experts of a layer lay on."""


def save_training_state(
    engine: "deepspeed.DeepSpeedEngine", directory: Path, *, num_steps: int, copy: EmaCopy | None
) -> None:
    """Write this rank's shards, random state and shard of the EMA reference; rank 0 also writes the step count.
    Collective.

    Raises:
        CheckpointError: on every rank, if any rank could not write, or if the ranks do not share the folder.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    errors = WriteErrors()
    with errors.collected(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with _shard_errors_collected(engine, errors):
        engine.save_checkpoint(str(directory), tag=SHARDS, save_latest=False, exclude_frozen_parameters=True)
    random_state = {"cpu": torch.get_rng_state(), FROZEN: frozen_digest(engine.module)}
    if torch.cuda.is_available():
        random_state["cuda"] = torch.cuda.get_rng_state()
    with errors.collected(directory / _random_state_name(rank)):
        save_file(random_state, directory / _random_state_name(rank))
        if copy is not None:
            copy.save(directory)
        if rank == 0:
            layout = {"num_ranks": num_ranks, STAGE: engine.zero_optimization_stage()}
            state = {"num_steps": num_steps, **layout, HOLDERS: num_holders(engine.module)}
            (directory / STATE).write_text(json.dumps(state))
    errors.raise_if_any(f"checkpoint: {directory}")
    require_all_seen(directory, num_ranks)


def require_all_seen(directory: Path, num_ranks: int) -> None:
    """Raise CheckpointError if this node does not see what every rank wrote: a checkpoint that is spread over the
    disks of several nodes could never be loaded."""
    missing = [rank for rank in range(num_ranks) if not (directory / _random_state_name(rank)).exists()]
    if missing:
        ranks = ", ".join(map(str, missing))
        raise CheckpointError(
            f"checkpoint: {directory} on {socket.gethostname()} does not hold what rank {ranks} wrote: set run.dir to "
            "a folder that all nodes share"
        )


@contextmanager
def _shard_errors_collected(engine: "deepspeed.DeepSpeedEngine", errors: WriteErrors) -> Iterator[None]:
    """Inside this block a failed write does not take DeepSpeed out of its own barriers, and no recovery script is
    written."""
    writer = engine.checkpoint_engine
    save = writer.save
    # DeepSpeed leaves out a frozen parameter under one of its names only: a tied one is written under its other names.
    frozen = {name for name, p in engine.module.named_parameters(remove_duplicate=False) if not p.requires_grad}

    def save_or_collect(state_dict: dict[str, object], path: str) -> None:
        module = state_dict.get("module")
        if isinstance(module, dict):
            state_dict = {**state_dict, "module": {name: w for name, w in module.items() if name not in frozen}}
        with errors.collected(Path(path), tensor_bytes(state_dict)):
            save(state_dict, path)

    writer.save, engine._copy_recovery_script = save_or_collect, lambda _folder: None
    try:
        yield
    finally:
        writer.save = save
        del engine._copy_recovery_script


def load_training_state(engine: "deepspeed.DeepSpeedEngine", directory: Path, *, copy: EmaCopy | None) -> int:
    """Restore what `save_training_state` wrote and return the number of steps taken. Collective."""
    state = json.loads((directory / STATE).read_text())
    if state["num_ranks"] != dist.get_world_size():
        raise CheckpointError(f"{directory}: saved on {state['num_ranks']} ranks, now {dist.get_world_size()}.")
    stage = engine.zero_optimization_stage()
    # Older checkpoints do not record the stage; ZeRO shards are recognized by their file names.
    is_sharded = any((directory / SHARDS).glob("*zero_pp_rank*"))
    saved = state.get(STAGE, stage or 2 * is_sharded)
    if saved != stage:  # DeepSpeed would load the weights and drop the optimizer state
        raise CheckpointError(
            f"{directory}: laid out by ZeRO stage {saved}, now {stage}. Continue with the dtype, offload_*, "
            "swap_optimizer and version that it was saved with"
        )
    if (holders := state.get(HOLDERS, 1)) != (now := num_holders(engine.module)):
        raise CheckpointError(f"{directory}: saved with expert_parallel_size {holders}, now {now}.")
    random_state = load_file(directory / _random_state_name(dist.get_rank()))
    same: list[bool | None] = [None] * dist.get_world_size()
    mine = frozen_digest(engine.module)
    dist.all_gather_object(same, torch.equal(random_state.get(FROZEN, mine), mine))
    if not all(same):  # on every rank, or the others would wait for this one
        raise CheckpointError(
            f"{directory}: saved with other frozen weights than those that are loaded. Adapters can only continue with "
            "the base model that they were trained with"
        )
    # Frozen weights are not in the checkpoint; they were loaded with the model.
    is_whole = all(parameter.requires_grad for parameter in engine.module.parameters())
    path, _ = engine.load_checkpoint(str(directory), tag=SHARDS, load_module_strict=is_whole)
    if path is None:
        raise CheckpointError(f"{directory}: holds no shards of this model.")
    if copy is not None:
        copy.load(directory)
    torch.set_rng_state(random_state["cpu"])
    if "cuda" in random_state:
        torch.cuda.set_rng_state(random_state["cuda"])
    return int(state["num_steps"])


def _random_state_name(rank: int) -> str:
    return f"random_state_{rank}.safetensors"
