"""What rank 0 of the policy does in a run: it reads, holds its part, learns, saves, resumes and exports.

Run as `python -m benchmarks.seventy.ranks PART FOLDER RESULT FLAG...`, with a checkpoint in FOLDER and the flags of the
run; writes what it measured to RESULT, as JSON.
"""

import gc
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import xxhash

from benchmarks.seventy import lone_rank
from benchmarks.seventy.files import content_of, disk_bytes, save_sparse
from benchmarks.seventy.memory import Measured, measured
from rlhf.algorithms import build_algorithm
from rlhf.config.algo import SftSection
from rlhf.config.commands import OnlineConfig
from rlhf.config.loading.load import load_config
from rlhf.config.models import TrainedModelSection
from rlhf.engines.models.finite_weights import require_finite
from rlhf.engines.training import stored_model
from rlhf.engines.training.checkpoint import _random_state_name
from rlhf.engines.training.engine import DeepSpeedEngine
from rlhf.engines.training.export import export_model
from rlhf.engines.training.optimizer import training_config
from rlhf.engines.training.partitioned_loading import load_on_rank_zero, partition
from rlhf.engines.training.specs import TrainedModelSpec
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, plan_batches
from rlhf.types import Experience, Head, LearnedSequence, Role

CPU = torch.device("cpu")
NUM_TOKENS = 16
WHERE = "policy.model"


def load_and_export(folder: Path, section: TrainedModelSection) -> dict[str, object]:
    """All layers, without an optimizer: read, check, partition, export."""
    phases: dict[str, Measured] = {}
    with measured() as phases["read and check"]:
        loaded = load_on_rank_zero(
            section, str(folder), Head.LOG_PROBS, where=WHERE, device=CPU, seed=0, new_head=False
        )
    with measured() as phases["partition"]:
        partition(
            loaded.model, CPU, training_config(section, torch.bfloat16, CPU), hpz_size=section.zero_hpz_partition_size
        )
        gc.collect()
    exported = folder.with_name(f"{folder.name}-exported")
    with measured() as phases["export"]:
        require_finite(loaded.model, WHERE, CPU)
        export_model(loaded, exported, section.lora)
    return _figures(phases) | {
        "is_equal": content_of(exported) == content_of(folder),
        "num_files": len(list(exported.glob("*.safetensors"))),
        "disk_bytes": disk_bytes(exported),
        "held": sum(part.nbytes for part in _parts(loaded.model)),
    }


def learn_save_and_resume(folder: Path, section: TrainedModelSection) -> dict[str, object]:
    """Few layers, with everything that a rank that learns has: a step, a checkpoint, another process's start from it,
    and an export that is compared."""
    phases: dict[str, Measured] = {}
    checkpoint, exported = folder.with_name(f"{folder.name}-step_1"), folder.with_name(f"{folder.name}-exported")
    with measured() as phases["start"]:
        engine = _engine(folder, section)
    with measured() as phases["first export and check"]:
        engine.export(exported)
        engine.check_export(exported)
    with measured() as phases["step"]:
        report = _step(engine)
    with measured() as phases["save"]:
        _stand_in_for_the_others(checkpoint, engine.num_ranks)
        engine.save(checkpoint)
    saved = _digest(engine)
    del engine
    gc.collect()
    engine = _engine(folder, section)
    before = _digest(engine)
    with measured() as phases["resume"]:
        engine.load(checkpoint)
    return _figures(phases) | {
        "is_resumed": _digest(engine) == saved != before,
        "finite": report,
        "disk_bytes": disk_bytes(checkpoint),
    }


PARTS = {"load": load_and_export, "learn": learn_save_and_resume}


def _engine(folder: Path, section: TrainedModelSection) -> DeepSpeedEngine:
    spec = TrainedModelSpec(
        section=section,
        model=str(folder),
        head=Head.LOG_PROBS,
        algorithm=SftSection(),
        temperature=1.0,
        num_steps=2,
        seed=0,
    )
    return DeepSpeedEngine(spec, build_algorithm(SftSection()).objectives(), device="cpu", where=WHERE)


def _step(engine: DeepSpeedEngine) -> bool:
    sequence = LearnedSequence(
        token_ids=np.arange(4, 4 + NUM_TOKENS), loss_mask=np.arange(NUM_TOKENS) >= NUM_TOKENS // 2
    )
    data = [Experience(id=str(rank), sequences=(sequence,)) for rank in range(engine.num_ranks)]
    limits = MicroBatchLimits(num_ranks=engine.num_ranks, max_tokens_per_micro_batch=NUM_TOKENS)
    batches = build_batches(plan_batches(data, limits), data, Role.POLICY)
    engine.forward_backward(batches[: len(batches) // engine.num_ranks])
    return engine.optim_step().finite


def _stand_in_for_the_others(checkpoint: Path, num_ranks: int) -> None:
    """The files by which a save sees that all ranks have written to one folder."""
    checkpoint.mkdir()
    for rank in range(1, num_ranks):
        (checkpoint / _random_state_name(rank)).touch()


def _digest(engine: DeepSpeedEngine) -> str:
    """Of this rank's master weights, moments and weights in the model's dtype."""
    digest = xxhash.xxh3_128()
    for tensor in _states(engine):
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _states(engine: DeepSpeedEngine) -> Iterator[torch.Tensor]:
    yield from engine._engine.optimizer.fp32_partitioned_groups_flat
    for state in engine._optimizer.state.values():
        yield from (value for _, value in sorted(state.items()) if value.dim())
    yield from _parts(engine.module)


def _parts(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """What this rank holds of each parameter."""
    for parameter in model.parameters():
        yield vars(parameter)["ds_tensor"]


def _figures(phases: Mapping[str, Measured]) -> dict[str, object]:
    return {"phases": {name: one.as_json() for name, one in phases.items()}}


def main() -> None:
    part, folder, result, *flags = sys.argv[1:]
    config = load_config("grpo", flags, {})
    assert isinstance(config, OnlineConfig)
    lone_rank.join(config.policy.num_ranks)
    vars(stored_model)["save_file"] = save_sparse
    figures = PARTS[part](Path(folder), config.policy)
    Path(result).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
