"""What the training engine's worker does with checkpoints: resume, refuse another layout, meet a full disk."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from tests.integration.expected_errors import error_of
from tests.integration.training_rows import experiences

if TYPE_CHECKING:
    from tests.integration.training_worker import Scenarios

FOUR = (20, None)
EXPORTED = (("tied", 3, "float32"), ("untied", 3, "bfloat16"), ("untied", 1, "float32"), ("experts", 3, "float32"))
"""Model, ZeRO stage and dtype of what is exported."""


@contextmanager
def full_disk() -> Iterator[None]:
    """Inside, no file of this process grows past a kilobyte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def resume(scenarios: "Scenarios") -> None:
    """Four steps at once, and two, a save, a fresh engine that loads, and two more."""
    for stage, dtype in ((0, "float32"), (2, "float32"), (3, "float32"), (3, "bfloat16")):
        name = f"zero{stage}-{dtype}"
        settings = {"zero_stage": stage, "dtype": dtype, "lr_schedule": "cosine", "warmup_ratio": 0.3}
        whole = scenarios.engine("tied", num_steps=4, **settings)  # type: ignore[arg-type]
        start = scenarios.weights(whole)
        lrs = [scenarios.step(whole, experiences(seed=0), FOUR)[1].lr]
        scenarios.record(f"resume/{name}/first_update", (scenarios.weights(whole) - start).abs().max())
        lrs += [scenarios.step(whole, experiences(seed=i), FOUR)[1].lr for i in range(1, 4)]
        first = scenarios.engine("tied", num_steps=4, **settings)  # type: ignore[arg-type]
        for i in range(2):
            scenarios.step(first, experiences(seed=i), FOUR)
        checkpoint = scenarios.folder / "checkpoints" / name
        first.save(checkpoint)
        second = scenarios.engine("tied", num_steps=4, **settings)  # type: ignore[arg-type]
        second.load(checkpoint)
        again = [scenarios.step(second, experiences(seed=i), FOUR)[1].lr for i in (2, 3)]
        scenarios.record(f"resume/{name}/same", torch.equal(scenarios.weights(whole), scenarios.weights(second)))
        scenarios.record(f"resume/{name}/moved", not torch.equal(scenarios.weights(first), scenarios.weights(second)))
        scenarios.record(f"resume/{name}/lr", torch.tensor(lrs[2:]) - torch.tensor(again))
        scenarios.record(f"resume/{name}/lrs", torch.tensor(lrs))


def relaid(scenarios: "Scenarios") -> None:
    """Checkpoints of another ZeRO stage: one that says so, and one from before they did."""
    unsharded, sharded = (scenarios.folder / "checkpoints" / f"relaid-{stage}" for stage in (0, 2))
    for stage, checkpoint in ((0, unsharded), (2, sharded)):
        engine = scenarios.engine(zero_stage=stage)
        scenarios.step(engine, experiences(), FOUR)
        engine.save(checkpoint)
    scenarios.record(
        "relaid/message", "laid out by ZeRO stage 0, now 2" in error_of(scenarios.engine(zero_stage=2).load, unsharded)
    )
    dist.barrier()
    if scenarios.rank == 0:
        (sharded / "state.json").write_text(json.dumps({"num_steps": 1, "num_ranks": scenarios.num_ranks}))
    dist.barrier()
    scenarios.record(
        "relaid/older", "laid out by ZeRO stage 2, now 0" in error_of(scenarios.engine(zero_stage=0).load, sharded)
    )
    scenarios.record("relaid/read", error_of(scenarios.engine(zero_stage=2).load, sharded) == "")


def refused(scenarios: "Scenarios") -> None:
    """Saves and exports that the disk of one rank refuses, the step after them, and a save that finds room."""
    for stage, bad in ((0, 0), (3, 0), (3, 1)):
        name = f"refused/zero{stage}-rank{bad}"
        engine, alone = (scenarios.engine(zero_stage=stage) for _ in range(2))
        for one in (engine, alone):
            scenarios.step(one, experiences(), FOUR)
        checkpoint = scenarios.folder / "checkpoints" / f"refused-{stage}-{bad}"
        with full_disk() if scenarios.rank == bad else nullcontext():
            scenarios.record(f"{name}/save", f"rank {bad}: " in error_of(engine.save, checkpoint))
            scenarios.record(f"{name}/export", "rank 0: " in error_of(engine.export, checkpoint / "export"))
        for one in (engine, alone):
            scenarios.step(one, experiences(seed=1), FOUR)
        scenarios.record(f"{name}/undisturbed", torch.equal(scenarios.weights(engine), scenarios.weights(alone)))
        scenarios.record(f"{name}/saved", error_of(engine.save, checkpoint) == "")
        with torch.no_grad():
            if scenarios.rank == 1 and stage == 0:
                next(engine.module.parameters()).view(-1)[0] += 1
        is_seen = "parameters differ between ranks: " in error_of(engine.save, checkpoint)
        scenarios.record(f"{name}/replicas", is_seen is (stage == 0 and scenarios.num_ranks > 1))
