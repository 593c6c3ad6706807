"""One rank of models that only compute, for tests of how they came there.

Run as `python -m tests.integration.partitioned_loading_worker RANK WORLD_SIZE PORT RESULT MODEL:STAGE:QUANTIZATION
...`. Writes to RESULT, as JSON, for each model in turn how many bytes this process grew by at most while it loaded, how
many values of parameters not yet partitioned had memory at once, the model's outputs for one sequence, and for a
partitioned large model how many bytes the process grew by during an export; or why the model was refused.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist

from rlhf.config.models import LoraSection, ModelSection
from rlhf.engines.models.loading import LoadedModel
from rlhf.engines.process.device_memory import free_memory
from rlhf.engines.process.distributed import init_distributed
from rlhf.engines.process.process_memory import peak_host_memory
from rlhf.engines.process.rendezvous import open_store
from rlhf.engines.training import partitioned_loading, stored_model
from rlhf.engines.training.export import export_model
from rlhf.engines.training.scoring import ScoringEngine
from rlhf.engines.training.specs import ScorerSpec
from rlhf.errors import ModelError
from rlhf.types import Head, PackedTokens

FORGET_PEAK = ("/proc/self/clear_refs", "5")
"""What to write where to reset the peak memory that Linux reports for this process."""
M_MMAP_THRESHOLD = -3
"""glibc's number of the parameter."""
MAX_SHARD = 40 * 2**20
"""Bytes of a file of an export: a sixth of the model that is exported."""
SEQUENCE = np.arange(3, 19)


def load(model: str, stage: str, quantization: str) -> dict[str, object]:
    """Load a model and ask it."""
    section = ModelSection.model_validate({"zero_stage": int(stage), "quantization": quantization})
    Path(FORGET_PEAK[0]).write_text(FORGET_PEAK[1])
    before = psutil.Process().memory_info().rss
    materialize = partitioned_loading._materialize
    came: list[torch.nn.Parameter] = []
    at_once = 0

    def count(parameter: torch.nn.Parameter, device: torch.device) -> None:
        nonlocal at_once
        materialize(parameter, device)
        came.append(parameter)
        at_once = max(at_once, sum(parameter.numel() for parameter in came))

    partitioned_loading._materialize = count
    try:
        spec = ScorerSpec(section=section, model=model, head=Head.LOG_PROBS, temperature=1.0, seed=0)
        engine = ScoringEngine(spec, device="cpu", where="policy")
    except ModelError as error:
        return {"refused": str(error)}
    finally:
        partitioned_loading._materialize = materialize
    grown = peak_host_memory() - before
    (outputs,) = engine.forward([PackedTokens(token_ids=SEQUENCE, lengths=np.array([len(SEQUENCE)]))])
    seen: dict[str, object] = {"grown": grown, "at_once": at_once, "outputs": outputs.tolist()}
    if model.endswith("large") and quantization == "none" and stage == "3":
        seen["export_grown"] = export(engine, Path(model))
    return seen


def export(engine: ScoringEngine, model: Path) -> int:
    """Export a partitioned model in files of at most `MAX_SHARD`; returns how many bytes this process grew by."""
    engine._model.optimizer.partition_all_parameters()  # type: ignore[union-attr, operator]
    packed_model = engine._model.module
    loaded = LoadedModel(model=packed_model.model, folder=model, dropouts={})  # type: ignore[arg-type, union-attr]
    stored_model.MAX_SHARD = MAX_SHARD
    free_memory()
    Path(FORGET_PEAK[0]).write_text(FORGET_PEAK[1])
    before = psutil.Process().memory_info().rss
    export_model(loaded, model.with_name("exported"), LoraSection())
    return peak_host_memory() - before


def main() -> None:
    # glibc gives large blocks back at once when they are freed, where otherwise it keeps as much as it sees fit.
    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    rank, world_size, port = map(int, sys.argv[1:4])
    init_distributed(rank, world_size, open_store(rank, "127.0.0.1", port, 120), device="cpu", timeout_s=120)
    results = {}
    for case in sys.argv[5:]:
        results[case] = load(*case.rsplit(":", 2))
        free_memory()
    Path(sys.argv[4]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
