"""The ranks of the tests of sequence and expert parallelism: run all cases in one process group, write what they saw.

Run as `python -m tests.integration.sequence_parallel_worker RANK WORLD_SIZE PORT FOLDER CASE...`. The test judges;
this only records.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from rlhf.algorithms.base import LossOutput, Outputs, TensorBatch
from rlhf.config.algo import SftSection
from rlhf.config.models import ModelSection, TrainedModelSection
from rlhf.engines.models.router_replay import CHANGED, REPLAYED
from rlhf.engines.models.split_experts import SplitTensor, under_own_names
from rlhf.engines.process.distributed import deepspeed, init_distributed
from rlhf.engines.process.rendezvous import open_store
from rlhf.engines.training.engine import DeepSpeedEngine
from rlhf.engines.training.held_tensors import held_tensors
from rlhf.engines.training.router_balance import BALANCE
from rlhf.engines.training.scoring import ScoringEngine
from rlhf.engines.training.specs import ScorerSpec, TrainedModelSpec
from rlhf.engines.weight_sync.buckets import plan_buckets
from rlhf.engines.weight_sync.sources import make_source
from rlhf.errors import ModelError
from rlhf.orchestrator.step.batching import (
    BatchPlan,
    MicroBatchLimits,
    build_batches,
    pack_tokens,
    plan_batches,
    unpack_scores,
    unpack_tokens,
)
from rlhf.types import Experience, FloatArray, Head, Metrics, Signal
from tests.integration.training_losses import OBJECTIVES
from tests.integration.training_rows import experiences, rankings, routed, whole

SETTINGS: dict[str, object] = {
    **{"lr": 1e-2, "lr_schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0, "adam_betas": (0.0, 0.95)}
}
"""The first moment of AdamW is then the gradient."""
EXTRAS: dict[str, dict[str, object]] = {
    "lora": {"lora": {"rank": 4, "alpha": 8.0}},
    "checkpointing": {"gradient_checkpointing": True},
    "kept": {"gradient_checkpointing": "offload"},
    "chunks": {"mlp_chunk_tokens": 5},
    "nf4": {"quantization": "nf4"},
    "chunked": {"log_probs_chunk_tokens": 3, "log_probs_kept_mib": 0.0},
    "bfloat16": {"dtype": "bfloat16"},
    "balance": {},
    "stored": {},
    "replay": {},
    "offload": {"offload_optimizer": True, "offload_parameters": True},
    "split2": {"expert_parallel_size": 2},
    "split4": {"expert_parallel_size": 4},
    "clipped": {"max_grad_norm": 0.01},
    "decayed": {"weight_decay": 0.1},
    "frozen": {"freeze_router": True},
    "router32": {"float32_router": True},
}
BUCKET = 2**16
"""Bytes: a bucket is a layer."""
TIMEOUT_S = 120
OBJECTIVE = {Head.LOG_PROBS: "policy", Head.VALUES: "value", Head.SCORES: "reward"}
LIMITS = {"packed": 1000, "single": 1}


def value_loss(outputs: Outputs, batch: TensorBatch) -> LossOutput:
    """Values weighted by advantages, over the step's tokens."""
    weights = torch.where(batch.loss_mask, batch.signals[Signal.ADVANTAGES], 0.0)
    loss = (weights * outputs.predictions).sum() / batch.denominators.tokens
    return LossOutput(loss=loss, metrics=Metrics(sums={"loss": float(loss.detach())}))


class Ranks:
    """One rank; what it records is by name."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.shares = self.world // size

    def own(self, batches: list[object]) -> list[object]:
        """This rank's micro-batches: those of its group."""
        n = len(batches) // self.shares
        share = self.rank // self.size
        return batches[share * n : (share + 1) * n]

    def plan(self, data: list[Experience], most: int) -> BatchPlan:
        return plan_batches(data, MicroBatchLimits(num_ranks=self.shares, max_tokens_per_micro_batch=most))

    def outputs(self, engine: DeepSpeedEngine | ScoringEngine, data: list[Experience], most: int) -> list[FloatArray]:
        """Every micro-batch's output, in rank-major order, as the first ranks of the groups have them."""
        mine = engine.forward(self.own(pack_tokens(self.plan(data, most), data)))  # type: ignore[arg-type]
        of_ranks: list[list[FloatArray]] = [[]] * self.world
        dist.all_gather_object(of_ranks, mine)
        for first in range(0, self.world, self.size):
            for other in of_ranks[first : first + self.size]:
                assert all(np.array_equal(a, b) for a, b in zip(of_ranks[first], other, strict=True))
        return [array for first in of_ranks[:: self.size] for array in first]


def case(name: str, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """One case: MODEL-HEAD-SIZE-STAGE-LIMIT[-EXTRA...]."""
    model, head_name, size, stage, limit, *extras = name.split("-")
    ranks, head, most = Ranks(folder, int(size)), Head(head_name), LIMITS.get(limit) or int(limit)
    common = {"zero_stage": int(stage), "sequence_parallel_size": int(size)}
    settings = SETTINGS | common | {key: value for extra in extras for key, value in EXTRAS[extra].items()}
    spec = TrainedModelSpec(
        section=TrainedModelSection.model_validate(settings),
        model=str(folder / model),
        head=head,
        algorithm=SftSection(router_aux_coef=0.1 if "balance" in extras else 0.0),
        temperature=0.7,
        num_steps=10,
        seed=0,
        replays_routers="replay" in extras,
    )
    engine = DeepSpeedEngine(spec, {**OBJECTIVES, "value": value_loss}, device="cpu", where="policy.model")
    if "stored" in extras:
        yield from stored_weights(engine)
    data = rankings() if head is Head.SCORES else experiences()
    data = routed(data) if spec.replays_routers else data
    plan = ranks.plan(data, most)
    batches = build_batches(plan, data, OBJECTIVE[head])
    if head is Head.SCORES:
        scores = unpack_scores(plan, data, ranks.outputs(engine, data, most))
        yield "outputs", torch.tensor([score for i in sorted(scores) for score in scores[i]])
    else:
        arrays = unpack_tokens(plan, data, ranks.outputs(engine, whole(data), most))
        yield "outputs", torch.tensor(np.concatenate([array for i in sorted(arrays) for array in arrays[i]]))
    scorer = ScorerSpec(
        section=ModelSection.model_validate(
            common | {key: settings[key] for key in ("dtype", "mlp_chunk_tokens") if key in settings}
        ),
        model=spec.model,
        head=head,
        temperature=0.7,
        seed=0,
    )
    if head is Head.LOG_PROBS and extras in ([], ["chunks"]):
        outputs = ranks.outputs(ScoringEngine(scorer, device="cpu", where="reference.model"), whole(data), most)
        arrays = unpack_tokens(plan, data, outputs)
        yield "reference", torch.tensor(np.concatenate([array for i in sorted(arrays) for array in arrays[i]]))
    metrics = engine.forward_backward(ranks.own(batches)).metrics  # type: ignore[arg-type]
    report = engine.optim_step()
    for metric in ("loss", BALANCE, REPLAYED, CHANGED):
        total = torch.tensor(metrics.sums.get(metric, 0.0))
        dist.all_reduce(total)
        yield metric, total
    yield "norm", torch.tensor(report.grad_norm)
    yield "num_unmoved", torch.tensor(len(report.unmoved))
    for parameter_name, parameter in under_own_names(engine.module, engine.module.named_parameters()):
        if (gradient := first_moment(engine, parameter)) is not None:
            yield f"grad/{parameter_name}", gradient
    engine.forward_backward(ranks.own(build_batches(plan, data, batches[0].objective)))  # type: ignore[arg-type]
    yield "second_norm", torch.tensor(engine.optim_step().grad_norm)


def first_moment(engine: DeepSpeedEngine, parameter: torch.Tensor | SplitTensor) -> torch.Tensor | None:
    """The whole first moment of a parameter that learns. Collective under ZeRO-3."""
    if isinstance(parameter, SplitTensor):
        parts = [first_moment(engine, part) for part in parameter.parts]
        if parts[0] is None:
            return None
        own = torch.cat([part for part in parts if part is not None], dim=1)
        of_ranks = [torch.empty_like(own) for _ in range(parameter.size)]
        dist.all_gather(of_ranks, own, group=parameter.group)
        return torch.cat(of_ranks)
    if not parameter.requires_grad:
        return None
    moment: torch.Tensor = (
        deepspeed.utils.safe_get_full_optimizer_state(parameter, "exp_avg")
        if engine._section.zero_stage
        else engine._optimizer.state[parameter]["exp_avg"]
    )
    return moment.clone()


def stored_weights(engine: DeepSpeedEngine) -> Iterator[tuple[str, torch.Tensor]]:
    """What an export and a weight sync would read, by name. Collective."""
    for name, held in held_tensors(engine.module).items():
        with held.whole() as tensor:
            yield f"held/{name}", tensor.clone()
    source = make_source(engine.module, "float32", stored_names=True)
    for bucket in plan_buckets(source.specs(), source.dtype, BUCKET):
        flat = torch.empty(bucket.numel) if dist.get_rank() == 0 else None
        source.gather(bucket, flat).wait(TIMEOUT_S)
        whole = dict(source.materialize(bucket))
        if flat is not None:
            assert all(torch.equal(view, whole[name]) for name, view in bucket.views(flat))
        yield from ((f"sent/{name}", tensor.clone()) for name, tensor in whole.items())


def main() -> None:
    rank, world_size, port, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    store = open_store(rank, "127.0.0.1", port, TIMEOUT_S)
    init_distributed(rank, world_size, store, device="cpu", timeout_s=TIMEOUT_S)
    tensors: dict[str, torch.Tensor] = {}
    for name in sys.argv[5:]:
        started = time.monotonic()
        try:
            tensors |= {f"{name}/{key}": value.contiguous() for key, value in case(name, folder)}
        except ModelError as error:
            tensors[f"{name}/refused"] = torch.tensor(list("\n".join(error.problems).encode()), dtype=torch.uint8)
        if rank == 0:
            print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)  # noqa: T201
    if rank == 0:
        save_file(tensors, folder / f"results_{world_size}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
