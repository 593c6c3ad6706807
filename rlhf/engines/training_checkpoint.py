"""Everything that a rank needs to continue bit for bit: DeepSpeed's own shards, the step count, the random state.

No `latest` file is written or trusted: the caller says which directory, after it has verified every file in it.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from rlhf.engines.distributed import deepspeed
from rlhf.engines.following import FollowingCopy
from rlhf.errors import CheckpointError

SHARDS = "deepspeed"
STATE = "state.json"


def save_training_state(
    engine: "deepspeed.DeepSpeedEngine", directory: Path, *, num_steps: int, copy: FollowingCopy | None
) -> None:
    """Write this rank's shards, random state and part of the copy that follows; rank 0 also writes the counts.
    Collective."""
    rank = dist.get_rank()
    directory.mkdir(parents=True, exist_ok=True)
    engine.save_checkpoint(str(directory), tag=SHARDS, save_latest=False)
    random_state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_state["cuda"] = torch.cuda.get_rng_state()
    save_file(random_state, directory / _random_state_name(rank))
    if copy is not None:
        copy.save(directory)
    if rank == 0:
        state = {"num_steps": num_steps, "num_ranks": dist.get_world_size()}
        (directory / STATE).write_text(json.dumps(state))
        for script in directory.glob("zero_to_*.py"):
            script.unlink()
    dist.barrier()


def load_training_state(engine: "deepspeed.DeepSpeedEngine", directory: Path, *, copy: FollowingCopy | None) -> int:
    """Restore what `save_training_state` wrote and return the number of steps taken. Collective."""
    state = json.loads((directory / STATE).read_text())
    if state["num_ranks"] != dist.get_world_size():
        raise CheckpointError(f"{directory}: saved on {state['num_ranks']} ranks, now {dist.get_world_size()}.")
    path, _ = engine.load_checkpoint(str(directory), tag=SHARDS)
    if path is None:
        raise CheckpointError(f"{directory}: holds no shards of this model.")
    if copy is not None:
        copy.load(directory)
    random_state = load_file(directory / _random_state_name(dist.get_rank()))
    torch.set_rng_state(random_state["cpu"])
    if "cuda" in random_state:
        torch.cuda.set_rng_state(random_state["cuda"])
    return int(state["num_steps"])


def _random_state_name(rank: int) -> str:
    return f"random_state_{rank}.safetensors"
