"""The ranks of the tests of expert parallelism: what leaves the ranks, and what a checkpoint restores.

Run as `python -m tests.integration.expert_parallel_worker RANK WORLD_SIZE PORT FOLDER CASE...`, a case being
MODEL-SIZE: a model in FOLDER, and the ranks that have the experts of each layer among them. The test judges; this only
records.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from rlhf.config.algo import SftSection
from rlhf.config.models import TrainedModelSection
from rlhf.engines.process.distributed import init_distributed
from rlhf.engines.process.rendezvous import open_store
from rlhf.engines.training.engine import DeepSpeedEngine
from rlhf.engines.training.specs import TrainedModelSpec
from rlhf.engines.weight_sync.buckets import plan_buckets
from rlhf.engines.weight_sync.source import WeightSource
from rlhf.engines.weight_sync.sources import make_source
from rlhf.errors import CheckpointError
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, plan_batches
from rlhf.types import Head
from tests.integration.training_losses import OBJECTIVES
from tests.integration.training_rows import experiences

BUCKET = 2**16
"""Bytes: a bucket is a layer."""
TIMEOUT_S = 120


class Case:
    """One model whose experts are on `size` ranks."""

    def __init__(self, folder: Path, name: str) -> None:
        self.model, _, size = name.rpartition("-")
        self.size, self.folder, self.results = int(size), folder, folder / name
        self.said: dict[str, object] = {}

    def engine(self) -> DeepSpeedEngine:
        section = TrainedModelSection(
            lr=1e-2,
            lr_schedule="constant",
            warmup_ratio=0.0,
            adam_eps=0.1,  # or the sign of a gradient that is nearly 0 would decide
            expert_parallel_size=self.size,
        )
        spec = TrainedModelSpec(
            section=section,
            model=str(self.folder / self.model),
            head=Head.LOG_PROBS,
            algorithm=SftSection(),
            temperature=1.0,
            num_steps=10,
            seed=0,
        )
        return DeepSpeedEngine(spec, OBJECTIVES, device="cpu", where="policy.model")

    def step(self, engine: DeepSpeedEngine, seed: int) -> None:
        """A step on data of its own on each rank."""
        data, rank = experiences(seed=seed), dist.get_rank()
        plan = plan_batches(data, MicroBatchLimits(num_ranks=dist.get_world_size(), max_tokens_per_micro_batch=40))
        batches = build_batches(plan, data, "policy")
        each = len(batches) // dist.get_world_size()
        engine.forward_backward(batches[rank * each : (rank + 1) * each])
        self.said[f"norm {seed}"] = engine.optim_step().grad_norm

    def send(self, engine: DeepSpeedEngine, start: str) -> None:
        """Write what rank 0 sends, under both kinds of names."""
        for kind in ("held", "stored"):
            sent = self._sent(make_source(engine.module, "float32", stored_names=kind == "stored"), engine)
            if dist.get_rank() == 0:
                save_file(sent, self.results / f"{start}_{kind}.safetensors")

    def _sent(self, source: WeightSource, engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
        """What a source gives; both ways in which it gives it say the same on rank 0."""
        sent: dict[str, torch.Tensor] = {}
        for bucket in plan_buckets(source.specs(), source.dtype, BUCKET):
            flat = torch.empty(bucket.numel, dtype=source.dtype) if dist.get_rank() == 0 else None
            engine._partition_all()
            source.gather(bucket, flat).wait(TIMEOUT_S)
            sent |= {name: tensor.clone() for name, tensor in source.materialize(bucket)}
            assert flat is None or all(torch.equal(view, sent[name]) for name, view in bucket.views(flat))
        return sent

    def run(self) -> None:
        engine = self.engine()
        engine.start_ema_reference(0.5)
        engine.export(self.results / "fresh")
        engine.check_export(self.results / "fresh")
        self.send(engine, "fresh")
        self.step(engine, 0)
        self.send(engine, "stepped")
        engine.export(self.results / "stepped")
        self.said["moved ema"] = engine.update_ema()
        engine.save(self.results / "saved")
        self.step(engine, 1)
        engine.export(self.results / "went_on")
        resumed = self.engine()
        resumed.start_ema_reference(0.5)
        self.step(resumed, 5)  # other weights, which the checkpoint replaces
        resumed.load(self.results / "saved")
        self.step(resumed, 1)
        resumed.export(self.results / "resumed")
        if self.size > 1:
            self._refuse()
        if dist.get_rank() == 0:
            (self.results / "said.json").write_text(json.dumps(self.said))

    def _refuse(self) -> None:
        """Load the checkpoint into a model whose experts are not spread."""
        alone = Case(self.folder, f"{self.model}-1").engine()
        try:
            alone.load(self.results / "saved")
        except CheckpointError as error:
            self.said["refused"] = str(error)


def main() -> None:
    rank, world_size, port, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    store = open_store(rank, "127.0.0.1", port, TIMEOUT_S)
    init_distributed(rank, world_size, store, device="cpu", timeout_s=TIMEOUT_S)
    for name in sys.argv[5:]:
        Case(folder, name).run()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
