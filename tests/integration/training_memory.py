"""A real engine whose loss runs out of memory, in a worker as a run has it.

Run as `python -m tests.integration.training_memory PORT FOLDER`, with a model in the folder. The test judges; this only
records.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from rlhf.actors.workers import ModelWorker
from rlhf.algorithms.base import LossOutput, Outputs, TensorBatch
from rlhf.engines.process.distributed import init_distributed
from rlhf.engines.process.rendezvous import open_store
from rlhf.engines.training.engine import DeepSpeedEngine
from rlhf.errors import MemoryExhaustedError
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, plan_batches
from rlhf.types import Role
from tests.integration.training_losses import OBJECTIVES
from tests.integration.training_rows import LENGTHS, experiences
from tests.integration.training_worker import Scenarios

NUM_FIT = max(LENGTHS)
"""Tokens of the largest micro-batch that fits."""


def hungry(outputs: Outputs, batch: TensorBatch) -> LossOutput:
    if batch.loss_mask.numel() > NUM_FIT:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return OBJECTIVES["policy"](outputs, batch)


def memory(scenarios: Scenarios) -> None:
    """The gradient in one micro-batch, and by an engine that runs out of memory until half ones fit. Each attempt has a
    new engine, as after a restart."""
    settings = {"zero_stage": 3, "max_grad_norm": 0.0, "adam_betas": (0.0, 0.95)}
    plain = scenarios.engine("tied", **settings)  # type: ignore[arg-type]
    scenarios.step(plain, experiences(), (sum(LENGTHS), None))
    errors: list[tuple[str, str, int]] = []
    limit = sum(LENGTHS)
    gradient: dict[str, torch.Tensor] | None = None
    while gradient is None:
        engine: DeepSpeedEngine = scenarios.engine("tied", **settings)  # type: ignore[arg-type]
        engine._objectives = {"policy": hungry}
        worker = ModelWorker(Path.cwd(), None)
        worker._trained[Role.POLICY] = engine
        limits = MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=limit, micro_batch_size=None)
        batches = build_batches(plan_batches(experiences(), limits), experiences(), "policy")
        try:
            worker.forward_backward(Role.POLICY, batches)
            worker.optim_step(Role.POLICY)
            gradient = scenarios.gradient(engine)
        except MemoryExhaustedError as error:
            errors.append((type(error).__name__, str(error), error.splittable_tokens))
            limit = error.splittable_tokens // 2
    for name, expected in scenarios.gradient(plain).items():
        scenarios.record(name, torch.stack([expected, gradient[name]]))
    (scenarios.folder / "errors.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    port, folder = int(sys.argv[1]), Path(sys.argv[2])
    init_distributed(0, 1, open_store(0, "127.0.0.1", port, 60.0), device="cpu", timeout_s=60.0)
    scenarios = Scenarios(folder)
    memory(scenarios)
    save_file(scenarios.tensors, folder / "gradients.safetensors")
    dist.destroy_process_group()
