"""The ranks of the tests of second partitions (hpZ): train with and without them, and write what they saw.

Run as `python -m tests.integration.secondary_partitions_worker RANK WORLD_SIZE PORT FOLDER`. The test judges;
this only records.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters
from safetensors.torch import save_file

from rlhf.config.algo import SftSection
from rlhf.config.models import ModelSection, TrainedModelSection
from rlhf.engines.process.distributed import init_distributed
from rlhf.engines.process.rendezvous import open_store
from rlhf.engines.training.engine import DeepSpeedEngine
from rlhf.engines.training.scoring import ScoringEngine
from rlhf.engines.training.specs import ScorerSpec, TrainedModelSpec
from rlhf.engines.weight_sync.buckets import plan_buckets
from rlhf.engines.weight_sync.zero3_source import Zero3Source
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, pack_tokens, plan_batches
from rlhf.types import Head
from tests.integration.training_large_model import thresholds
from tests.integration.training_losses import OBJECTIVES
from tests.integration.training_rows import experiences, whole

SIZES = (1, 2)
NUM_STEPS = 2
LIMIT = 20
"""Tokens of a micro-batch: each rank has several in a step."""
SETTINGS: dict[str, object] = {"lr": 1e-2, "lr_schedule": "constant", "warmup_ratio": 0.0, "zero_stage": 3}


class Rank:
    """One rank's engines and what they gave."""

    def __init__(self, folder: Path, size: int) -> None:
        self._folder = folder
        self._size = size
        self.results: dict[str, torch.Tensor] = {}

    def engine(self, **settings: object) -> DeepSpeedEngine:
        """A policy with this size of second partitions."""
        section = TrainedModelSection.model_validate(SETTINGS | {"zero_hpz_partition_size": self._size, **settings})
        spec = TrainedModelSpec(
            section=section,
            model=str(self._folder / "model"),
            head=Head.LOG_PROBS,
            algorithm=SftSection(),
            temperature=0.7,
            num_steps=10,
            seed=0,
        )
        with thresholds():
            return DeepSpeedEngine(spec, OBJECTIVES, device="cpu")

    def scorer(self) -> ScoringEngine:
        """A model that does not learn."""
        section = ModelSection(zero_stage=3, zero_hpz_partition_size=self._size)
        spec = ScorerSpec(
            section=section, model=str(self._folder / "model"), head=Head.LOG_PROBS, temperature=0.7, seed=0
        )
        with thresholds():
            return ScoringEngine(spec, device="cpu")

    def measure(self, name: str, engine: DeepSpeedEngine | ScoringEngine, *, ema: bool = False) -> None:
        """This rank's log-probs."""
        data = whole(experiences())
        plan = plan_batches(data, self._limits)
        batches = _own(pack_tokens(plan, data))
        outputs = engine.forward_ema_reference(batches) if ema else engine.forward(batches)  # type: ignore[union-attr]
        self.results[name] = torch.from_numpy(np.concatenate(outputs))

    def learn(self, name: str, engine: DeepSpeedEngine, step: int) -> None:
        """One step of several micro-batches: its loss, its gradient's norm, and who gathered with whom."""
        data = experiences(seed=step)
        with gathers() as sizes:
            batches = build_batches(plan_batches(data, self._limits), data, "policy")
            metrics = engine.forward_backward(_own(batches)).metrics
            report = engine.optim_step()
        self.results[f"{name}/loss"] = torch.tensor(sorted(metrics.sums.items())[0][1])
        self.results[f"{name}/norm"] = torch.tensor(report.grad_norm)
        self.results[f"{name}/gathers"] = torch.tensor([sizes.count(size) for size in (2, 4)])

    def sent(self, name: str, engine: DeepSpeedEngine) -> None:
        """What a weight sync would send: on rank 0, all weights."""
        engine._partition_all()
        source = Zero3Source(engine.module, torch.float32)
        for index, bucket in enumerate(plan_buckets(source.specs(), torch.float32, 10_000)):
            flat = torch.zeros(sum(spec.numel for spec in bucket.parameters)) if dist.get_rank() == 0 else None
            source.gather(bucket, flat).wait(60.0)
            if flat is not None:
                self.results[f"{name}/{index}"] = flat

    @property
    def _limits(self) -> MicroBatchLimits:
        return MicroBatchLimits(
            num_ranks=dist.get_world_size(), max_tokens_per_micro_batch=LIMIT, micro_batch_size=None
        )


def _own(batches: list) -> list:  # type: ignore[type-arg]
    n = len(batches) // dist.get_world_size()
    return batches[dist.get_rank() * n : (dist.get_rank() + 1) * n]


@contextmanager
def gathers() -> Iterator[list[int]]:
    """The sizes of the groups that DeepSpeed gathers parameters in."""
    sizes: list[int] = []
    gather = partition_parameters._dist_allgather_fn

    def counted(shard: torch.Tensor, whole: torch.Tensor, group: dist.ProcessGroup | None = None) -> object:
        sizes.append(dist.get_world_size(group))
        return gather(shard, whole, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition_parameters, "_dist_allgather_fn", counted)
        yield sizes


def run(folder: Path, size: int, settings: dict[str, object]) -> dict[str, torch.Tensor]:
    """Train, with a moving average beside it; save, export, send; and go on from what was saved."""
    rank = Rank(folder, size)
    engine = rank.engine(**settings)
    engine.start_ema_reference(0.5)
    for step in range(NUM_STEPS):
        rank.measure(f"{step}/before", engine)
        rank.learn(f"{step}", engine, step)
        engine.update_ema()
        rank.measure(f"{step}/ema", engine, ema=True)
        rank.measure(f"{step}/after", engine)
        rank.sent(f"{step}/sent", engine)
    saved = folder / f"saved_{size}_{'-'.join(settings)}"
    engine.save(saved)
    engine.export(folder / f"export_{size}_{'-'.join(settings)}")
    rank.learn("next", engine, NUM_STEPS)
    rank.measure("next/after", engine)
    again = rank.engine(**settings)
    again.start_ema_reference(0.5)
    rank.measure("again/first", again)
    again.load(saved)
    rank.measure("again/loaded", again)
    rank.learn("again", again, NUM_STEPS)
    rank.measure("again/after", again)
    scorer = rank.scorer()
    rank.measure("scorer", scorer)
    with gathers() as sizes:
        rank.measure("scorer/second", scorer)
    rank.results["scorer/gathers"] = torch.tensor([sizes.count(size) for size in (2, 4)])
    return rank.results


CASES: dict[str, dict[str, object]] = {"whole": {}}
if os.environ.get("RLHF_TEST_SECOND_PARTITIONS") == "all":
    CASES["adapters"] = {"lora": {"rank": 4, "alpha": 8.0}, "gradient_checkpointing": True}


def main() -> None:
    """All cases, one after the other."""
    rank, world_size, port, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    init_distributed(rank, world_size, open_store(rank, "127.0.0.1", port, 120), device="cpu", timeout_s=120)
    for case, settings in CASES.items():
        for size in SIZES:
            started = time.monotonic()
            results = run(folder, size, settings)
            if rank == 0:
                print(f"{case} {size}: {time.monotonic() - started:.1f} s", flush=True)  # noqa: T201
            save_file({k: v.contiguous() for k, v in results.items()}, folder / f"{case}_{size}_{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
