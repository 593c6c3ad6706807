"""One rank that learns from responses of several turns and segments: what each method's first update sees.

Run as `python -m tests.integration.segments_worker RANK WORLD_SIZE PORT FOLDER`. The test judges; this only records.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from rlhf.algorithms.online_dpo import OnlineDPO
from rlhf.algorithms.online_kto import OnlineKTO
from rlhf.algorithms.ppo import PPO
from rlhf.config.algo import OnlineDpoSection, OnlineKtoSection, PpoSection, SftSection
from rlhf.config.models import TrainedModelSection
from rlhf.engines.process.distributed import deepspeed, init_distributed
from rlhf.engines.process.rendezvous import open_store
from rlhf.engines.training.engine import DeepSpeedEngine
from rlhf.engines.training.specs import TrainedModelSpec
from rlhf.orchestrator.step.batching import (
    BatchPlan,
    MicroBatchLimits,
    build_batches,
    pack_tokens,
    plan_batches,
    unpack_tokens,
)
from rlhf.types import Experience, FloatArray, Head, LearnedSequence, Role, Signal

METHODS = {
    "ppo": PPO(PpoSection(value_clip=1e-12)),
    "online-dpo": OnlineDPO(OnlineDpoSection()),
    "online-kto": OnlineKTO(OnlineKtoSection()),
}
ROLES = {"ppo": Role.POLICY, "critic": Role.CRITIC, "online-dpo": Role.POLICY, "online-kto": Role.POLICY}
OBJECTIVES = {name: METHODS["ppo" if name == "critic" else name].objectives()[role] for name, role in ROLES.items()}
T = TypeVar("T")
TEMPERATURE = 0.7
LIMITS: dict[str, tuple[int, int | None]] = {"packed": (1000, None), "single": (1, 1)}
CASES = [
    *((name, "untied", stage, limit) for name in ROLES for stage in (0, 3) for limit in LIMITS),
    *((name, "opt", 3, "packed") for name in ("ppo", "online-dpo")),
]
"""What learns, from which model, ZeRO stage and limits. Sequences and segments of OPT take passes of their own."""
SETTINGS: dict[str, object] = {
    **{"lr": 1e-3, "lr_schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0, "adam_betas": (0.0, 0.95)}
}
"""The first moment of AdamW is then the gradient."""


def responses() -> list[LearnedSequence]:
    """Responses of one to four segments, each with turns of others between the policy's own."""
    rng = np.random.default_rng(5)
    made = []
    for sizes in ((24,), (13, 21), (9, 2, 17), (31,), (8, 8, 8, 12), (5, 40), (19,), (11, 7)):
        ids = rng.integers(4, 99, size=sum(sizes))
        starts = np.cumsum(sizes)[:-1]
        mask = np.repeat(rng.random(len(ids) // 3 + 1) < 0.6, 3)[: len(ids)]
        mask[[0, *starts]] = False
        mask[-1] = True
        noise = rng.normal(size=len(ids)).astype(np.float32)
        signals = {Signal.ADVANTAGES: noise, Signal.RETURNS: noise}
        made.append(
            LearnedSequence(token_ids=ids, loss_mask=mask, segment_starts=tuple(starts.tolist()), signals=signals)
        )
    return made


def data_for(name: str) -> list[Experience]:
    """The responses as the method takes them."""
    made = responses()
    if name == "online-dpo":
        pairs = zip(made[::2], made[1::2], strict=True)
        return [Experience(id=str(n), sequences=pair, targets=(1.0, 0.0)) for n, pair in enumerate(pairs)]
    given = {"z0": 0.0, "desirable": 1.0, "undesirable": 1.5} if name == "online-kto" else {}
    targets = [(float(n % 2),) if given else () for n in range(len(made))]
    return [
        Experience(id=str(n), sequences=(one,), targets=target, coefficients=given)
        for n, (one, target) in enumerate(zip(made, targets, strict=True))
    ]


def segments(data: Sequence[Experience]) -> list[Experience]:
    """Each segment as a sequence of its own."""
    cut: list[Experience] = []
    for experience in data:
        for one in experience.sequences:
            for start, end in pairwise([0, *one.segment_starts, len(one)]):
                alone = LearnedSequence(token_ids=one.token_ids[start:end], loss_mask=one.loss_mask[start:end])
                cut.append(Experience(id=str(len(cut)), sequences=(alone,)))
    return cut


@dataclass(kw_only=True)
class Ranks:
    """One rank; `tensors` are what it records."""

    folder: Path
    tensors: dict[str, torch.Tensor]

    def run(self, name: str, model: str, stage: int, limit: str) -> None:
        """Measure, then learn from what was measured."""
        head = Head.VALUES if name == "critic" else Head.LOG_PROBS
        spec = TrainedModelSpec(
            section=TrainedModelSection.model_validate({**SETTINGS, "zero_stage": stage}),
            model=str(self.folder / model),
            head=head,
            algorithm=SftSection(),
            temperature=TEMPERATURE,
            num_steps=10,
            seed=0,
        )
        engine = DeepSpeedEngine(spec, OBJECTIVES, device="cpu")
        case = f"{name}-{model}-zero{stage}-{limit}"
        data = data_for(name)
        measured = self.measured(engine, data, limit)
        flat = [array for one in measured for array in one]
        self.record(f"{case}/outputs", np.concatenate(flat))
        alone = self.measured(engine, segments(data), "single")
        self.record(f"{case}/alone", np.concatenate([array for one in alone for array in one]))
        of_policy = (Signal.OLD_LOG_PROBS, Signal.SAMPLER_LOG_PROBS)
        measures = {"ppo": of_policy, "critic": (Signal.VALUES,)}.get(name, (Signal.REF_LOG_PROBS,))
        data = [
            replace(
                one,
                sequences=tuple(
                    replace(sequence, signals={**sequence.signals, **dict.fromkeys(measures, array)})
                    for sequence, array in zip(one.sequences, arrays, strict=True)
                ),
            )
            for one, arrays in zip(data, measured, strict=True)
        ]
        plan = self.plan(data, limit)
        metrics = engine.forward_backward(self.own(build_batches(plan, data, name))).metrics
        engine.optim_step()
        for key, value in {**metrics.sums, **metrics.maxima}.items():
            self.record(f"{case}/metrics/{key}", np.array(value))
        for parameter, weight in engine.module.named_parameters():
            gradient = (
                deepspeed.utils.safe_get_full_optimizer_state(weight, "exp_avg")
                if stage
                else engine._optimizer.state[weight]["exp_avg"]
            )
            self.record(f"{case}/grad/{parameter}", gradient.clone().numpy())

    def plan(self, data: list[Experience], limit: str) -> BatchPlan:
        most, size = LIMITS[limit]
        limits = MicroBatchLimits(
            num_ranks=dist.get_world_size(), max_tokens_per_micro_batch=most, micro_batch_size=size
        )
        return plan_batches(data, limits)

    def own(self, batches: list[T]) -> list[T]:
        n = len(batches) // dist.get_world_size()
        return batches[dist.get_rank() * n : (dist.get_rank() + 1) * n]

    def measured(self, engine: DeepSpeedEngine, data: list[Experience], limit: str) -> list[tuple[FloatArray, ...]]:
        """What the model says of each sequence of each experience, on every rank."""
        plan = self.plan(data, limit)
        shares: list[list[FloatArray]] = [[]] * dist.get_world_size()
        dist.all_gather_object(shares, engine.forward(self.own(pack_tokens(plan, data))))
        arrays = unpack_tokens(plan, data, [array for share in shares for array in share])
        return [tuple(arrays[n]) for n in range(len(data))]

    def record(self, name: str, value: np.ndarray) -> None:
        self.tensors[name] = torch.tensor(value).contiguous()


def main() -> None:
    rank, world_size, port, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    init_distributed(rank, world_size, open_store(rank, "127.0.0.1", port, 120), device="cpu", timeout_s=120)
    ranks = Ranks(folder=folder, tensors={})
    for case in CASES:
        ranks.run(*case)
    save_file(ranks.tensors, folder / f"segments_{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
