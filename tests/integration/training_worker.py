"""One rank of the training engine's tests: runs every scenario in one process group and writes what it saw.

Run as `python -m tests.integration.training_worker RANK WORLD_SIZE PORT FOLDER`. The test judges; this only records.
"""

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from rlhf.config.algo import SftSection
from rlhf.config.models import ModelSection, TrainedModelSection
from rlhf.engines.models.finite_weights import local_shard
from rlhf.engines.process.distributed import deepspeed, init_distributed
from rlhf.engines.process.rendezvous import open_store
from rlhf.engines.training.engine import DeepSpeedEngine
from rlhf.engines.training.scoring import ScoringEngine
from rlhf.engines.training.specs import ScorerSpec, TrainedModelSpec
from rlhf.errors import ModelError
from rlhf.orchestrator.step.batching import (
    MicroBatchLimits,
    build_batches,
    pack_tokens,
    plan_batches,
    unpack_scores,
    unpack_tokens,
)
from rlhf.types import Experience, FloatArray, Head, LearnedSequence, Metrics, Signal, StepReport
from tests.integration.expected_errors import error_of
from tests.integration.training_adapters import adapters
from tests.integration.training_experts import experts
from tests.integration.training_large_model import large_model
from tests.integration.training_losses import OBJECTIVES
from tests.integration.training_rows import experiences, rankings, whole
from tests.integration.training_saves import EXPORTED, refused, relaid, resume

QUIET = {"lr": 1e-3, "lr_schedule": "constant", "warmup_ratio": 0.0}
Limit = tuple[int, int | None]
PACKED: Limit = (1000, None)
FOUR: Limit = (20, None)
SINGLE: Limit = (1, 1)


class Scenarios:
    """The scenarios of one rank; `record` keeps tensors by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.tensors: dict[str, torch.Tensor] = {}

    def engine(
        self,
        model: str = "untied",
        head: Head = Head.LOG_PROBS,
        *,
        num_steps: int = 10,
        router_aux_coef: float = 0.0,
        **settings: object,
    ) -> DeepSpeedEngine:
        spec = TrainedModelSpec(
            section=TrainedModelSection.model_validate({**QUIET, **settings}),
            model=str(self.folder / model),
            head=head,
            algorithm=SftSection(router_aux_coef=router_aux_coef),
            temperature=0.7,
            num_steps=num_steps,
            seed=0,
        )
        return DeepSpeedEngine(spec, OBJECTIVES, device="cpu")

    def scorer(self, section: ModelSection, model: str, head: Head = Head.LOG_PROBS) -> ScoringEngine:
        spec = ScorerSpec(section=section, model=str(self.folder / model), head=head, temperature=0.7, seed=0)
        return ScoringEngine(spec, device="cpu")

    def step(
        self,
        engine: DeepSpeedEngine,
        data: list[Experience],
        limit: Limit,
        objective: str = "policy",
    ) -> tuple[Metrics, StepReport]:
        plan = plan_batches(
            data,
            MicroBatchLimits(num_ranks=self.num_ranks, max_tokens_per_micro_batch=limit[0], micro_batch_size=limit[1]),
        )
        batches = build_batches(plan, data, objective)
        n = len(batches) // self.num_ranks
        metrics = engine.forward_backward(batches[self.rank * n : (self.rank + 1) * n]).metrics
        return metrics, engine.optim_step()

    def measure(
        self, engine: DeepSpeedEngine | ScoringEngine, data: list[Experience], limit: Limit
    ) -> list[FloatArray]:
        """Every micro-batch's output, in rank-major order, on every rank."""
        plan = plan_batches(
            data,
            MicroBatchLimits(num_ranks=self.num_ranks, max_tokens_per_micro_batch=limit[0], micro_batch_size=limit[1]),
        )
        batches = pack_tokens(plan, data)
        n = len(batches) // self.num_ranks
        shares: list[list[FloatArray] | None] = [None] * self.num_ranks
        dist.all_gather_object(shares, engine.forward(batches[self.rank * n : (self.rank + 1) * n]))
        return [array for share in shares if share is not None for array in share]

    def by_example(self, engine: DeepSpeedEngine | ScoringEngine, data: list[Experience], limit: Limit) -> torch.Tensor:
        """Per-token outputs of all examples, end to end in their order; 0 where nothing is learned from."""
        plan = plan_batches(
            data,
            MicroBatchLimits(num_ranks=self.num_ranks, max_tokens_per_micro_batch=limit[0], micro_batch_size=limit[1]),
        )
        arrays = unpack_tokens(plan, data, self.measure(engine, data, limit))
        return torch.tensor(np.concatenate([array for i in sorted(arrays) for array in arrays[i]]))

    def weights(self, engine: DeepSpeedEngine) -> torch.Tensor:
        """All weights, flat, in the model's dtype."""
        parts = []
        for parameter in engine.module.parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                parts.append(parameter.detach().clone().flatten())
        return torch.cat(parts)

    def gradient(self, engine: DeepSpeedEngine) -> dict[str, torch.Tensor]:
        """The last step's gradient: AdamW's first moment, whose decay rate these tests set to 0."""
        gradients = {}
        for name, parameter in engine.module.named_parameters():
            if engine._section.zero_stage:  # one rank alone may run another stage than the config's
                gradients[name] = deepspeed.utils.safe_get_full_optimizer_state(parameter, "exp_avg").clone()
            else:
                gradients[name] = engine._optimizer.state[parameter]["exp_avg"].clone()
        return gradients

    def record(self, name: str, value: torch.Tensor | float | bool) -> None:
        self.tensors[name] = torch.as_tensor(value).contiguous().clone()

    def gradients(self) -> None:
        """One step's gradient in every split, and in steps that follow others."""
        settings = {"max_grad_norm": 0.0, "adam_betas": (0.0, 0.95)}
        cases: list[tuple[str, int, Limit, dict[str, object]]] = [
            *((f"zero{stage}", stage, FOUR, {}) for stage in (0, 1, 2, 3)),
            ("packed", 3, PACKED, {}),
            ("single", 3, SINGLE, {}),
            ("checkpointing", 3, FOUR, {"gradient_checkpointing": True}),
            ("offload", 3, FOUR, {"offload_optimizer": True, "offload_parameters": True}),
            ("swap", 3, FOUR, {"swap_optimizer": True}),
            ("chunked", 3, FOUR, {"log_probs_chunk_tokens": 3}),
            ("tied", 3, FOUR, {"model": "tied"}),
            ("unpacked", 3, PACKED, {"model": "opt"}),
            ("eager", 0, FOUR, {"attention": "eager"}),
        ]
        alone = ("zero0", "zero3", "packed", "single", "swap", "eager")
        for name, stage, limit, extra in cases:
            if (self.num_ranks == 1 and name not in alone) or (self.num_ranks > 1 and name == "eager"):
                continue
            engine = self.engine(**{**settings, "zero_stage": stage, **extra})  # type: ignore[arg-type]
            metrics, report = self.step(engine, experiences(), limit)
            self.record(f"gradients/{name}/loss", metrics.sums.get("loss", 0.0))
            self.record(f"gradients/{name}/norm", report.grad_norm)
            for parameter, gradient in self.gradient(engine).items():
                self.record(f"gradients/{name}/grad/{parameter}", gradient)
        for stage in (0, 1, 2, 3):
            engine = self.engine(**{**settings, "zero_stage": stage, "lr": 1e-30})  # type: ignore[arg-type]
            self.step(engine, experiences(seed=7), SINGLE)
            self.step(engine, experiences(), PACKED)
            for parameter, gradient in self.gradient(engine).items():
                self.record(f"gradients/second{stage}/grad/{parameter}", gradient)

    def ratio(self) -> None:
        """Old log-probs from the trainer, then the first update."""
        for dtype in ("float32", "bfloat16"):
            engine = self.engine(zero_stage=3, dtype=dtype, gradient_checkpointing=True)
            data = experiences()
            plan = plan_batches(data, MicroBatchLimits(num_ranks=self.num_ranks, max_tokens_per_micro_batch=FOUR[0]))
            old = unpack_tokens(plan, data, self.measure(engine, data, FOUR))
            measured = [
                Experience(
                    id=e.id,
                    sequences=(
                        LearnedSequence(
                            token_ids=e.sequences[0].token_ids,
                            loss_mask=e.sequences[0].loss_mask,
                            signals={**e.sequences[0].signals, Signal.OLD_LOG_PROBS: old[i][0]},
                        ),
                    ),
                )
                for i, e in enumerate(data)
            ]
            metrics, _ = self.step(engine, measured, FOUR)
            self.record(f"ratio/{dtype}/first", metrics.maxima.get("ratio_error", 0.0))
            metrics, _ = self.step(engine, measured, FOUR)
            self.record(f"ratio/{dtype}/second", metrics.maxima.get("ratio_error", 0.0))

    def not_finite(self) -> None:
        """Steps with a bad micro-batch on one rank, then a good one; and the good one alone."""
        bad = experiences()
        bad[7] = experiences(fill=float("nan"))[7]
        for stage, dtype in ((0, "float32"), (0, "bfloat16"), (1, "bfloat16"), (2, "float32"), (3, "bfloat16")):
            name = f"not_finite/zero{stage}-{dtype}"
            alone = self.engine(zero_stage=stage, dtype=dtype, max_grad_norm=0.5)
            self.step(alone, experiences(), FOUR)
            engine = self.engine(zero_stage=stage, dtype=dtype, max_grad_norm=0.5)
            before = self.weights(engine)
            for kind, data, objective in (
                ("data", bad, "policy"),
                ("loss", experiences(), "broken loss"),
                ("gradient", experiences(), "broken gradient"),
            ):
                _, report = self.step(engine, data, FOUR, objective)
                self.record(f"{name}/{kind}/finite", report.finite)
                self.record(f"{name}/{kind}/unchanged", torch.equal(before, self.weights(engine)))
            _, report = self.step(engine, experiences(), FOUR)
            self.record(f"{name}/recovered", report.finite)
            self.record(f"{name}/clean", torch.equal(self.weights(engine), self.weights(alone)))
            self.record(f"{name}/moved", not torch.equal(self.weights(engine), before))

    def unmoved(self) -> None:
        """A score head of zeros passes no gradient on: only the head moves in the first step, all in the second. A
        skipped step moves nothing, and says nothing."""
        for stage, dtype in ((0, "bfloat16"), (2, "float32"), (3, "bfloat16")):
            engine = self.engine("zero_score", Head.SCORES, zero_stage=stage, dtype=dtype, lr=1e-7)
            _, first = self.step(engine, rankings(), PACKED, "reward")
            _, second = self.step(engine, rankings(), PACKED, "reward")
            name = f"unmoved/zero{stage}-{dtype}"
            self.record(f"{name}/head_moved", "score.weight" not in first.unmoved)
            self.record(f"{name}/num_unmoved", len(first.unmoved))
            self.record(f"{name}/second", len(second.unmoved))
            policy = self.engine(zero_stage=stage, dtype=dtype, lr=1e-7)
            _, report = self.step(policy, experiences(), FOUR)
            self.record(f"{name}/policy", len(report.unmoved))
            late = self.engine("zero_score", Head.SCORES, zero_stage=stage, dtype=dtype, lr=1e-7)
            self.step(late, rankings(), PACKED, "broken gradient")
            _, report = self.step(late, rankings(), PACKED, "reward")
            self.record(f"{name}/after_skip", len(report.unmoved))

    def exports(self) -> None:
        """What is exported, and what the engine says about the same tokens."""
        for model, stage, dtype in EXPORTED:
            engine = self.engine(model, zero_stage=stage, dtype=dtype, lr=1e-2)
            self.step(engine, experiences(), FOUR)
            name = f"{model}-zero{stage}-{dtype}"
            engine.export(self.folder / "exports" / name)
            engine.check_export(self.folder / "exports" / name)
            self.record(f"exports/{name}", self.by_example(engine, whole(experiences()), SINGLE))
            self.step(engine, experiences(), FOUR)
            try:
                engine.check_export(self.folder / "exports" / name)
                self.record(f"stale/{name}", False)
            except ModelError:
                self.record(f"stale/{name}", True)

    def rewards(self) -> None:
        """A reward model trained from a policy, exported, served, and turned into a critic."""
        engine = self.engine("untied", Head.SCORES, zero_stage=3)
        for _ in range(2):
            self.step(engine, rankings(), FOUR, "reward")
        folder = "exports/reward"
        engine.export(self.folder / folder)
        plan = plan_batches(rankings(), MicroBatchLimits(num_ranks=self.num_ranks, max_tokens_per_micro_batch=FOUR[0]))

        def scores(of: DeepSpeedEngine | ScoringEngine) -> torch.Tensor:
            found = unpack_scores(plan, rankings(), self.measure(of, rankings(), FOUR))
            return torch.tensor([score for i in sorted(found) for score in found[i]])

        self.record("rewards/trained", scores(engine))
        section = TrainedModelSection(zero_stage=3)
        self.record("rewards/served", scores(self.scorer(section, folder, Head.SCORES)))
        critic = self.engine(folder, Head.VALUES, zero_stage=3)
        self.record("rewards/values", self.by_example(critic, rankings(), FOUR))
        reference = self.scorer(section, "untied")
        self.record("rewards/reference", self.by_example(reference, whole(experiences()), FOUR))
        policy = self.engine(zero_stage=0)
        self.record("rewards/policy", self.by_example(policy, whole(experiences()), FOUR))
        self.record("rewards/wanted", self.by_example(policy, experiences(), FOUR))

    def offloads(self) -> None:
        """A scoring engine with offloaded parameters, compared with one whose parameters stay on the device."""
        outputs = []
        for is_away in (False, True):
            scorer = self.scorer(ModelSection(offload_parameters=is_away), "untied")
            self.record(f"offloads/{is_away}/sharded", hasattr(next(scorer._model.parameters()), "ds_tensor"))
            outputs.append(self.by_example(scorer, whole(experiences()), FOUR))
        self.record("offloads/same", torch.equal(*outputs))

    def poisoned(self) -> None:
        """A weight that is no number on one rank, in the part that this rank holds."""
        for stage, bad in ((0, 0), (2, 1), (3, 0), (3, 1)):
            name = f"poisoned-{stage}-{bad}"
            engine = self.engine(zero_stage=stage)
            checkpoint = self.folder / "checkpoints" / name
            if self.rank == bad:
                local_shard(engine.module.lm_head.weight).view(-1)[-1] = torch.nan
            self.record(f"{name}/save", "model: 1 of 21 parameters" in error_of(engine.save, checkpoint))
            self.record(f"{name}/unwritten", not checkpoint.exists())

    def ema_reference(self) -> None:
        """A running mean of the policy, and a copy of it, through steps, exports, a save and a load."""
        for stage, dtype, model in ((0, "bfloat16", "tied"), (2, "float32", "tied"), (3, "float32", "untied")):
            name = f"following/zero{stage}-{dtype}"
            settings = {"zero_stage": stage, "dtype": dtype, "lr": 1e-2}
            mean, plain = (self.engine(model, **settings) for _ in range(2))  # type: ignore[arg-type]
            mean.start_ema_reference(0.75)
            self.record(f"{name}/first", self.by_copy(mean))
            for step in range(2):
                self.step(mean, experiences(seed=step), FOUR)
                self.step(plain, experiences(seed=step), FOUR)
                self.record(f"{name}/moved{step}", mean.update_ema())
                mean.export(self.folder / "exports" / f"following{step}-{stage}")
                before = self.weights(mean)
                self.record(f"{name}/mean{step}", self.by_copy(mean))
                self.record(f"{name}/untouched{step}", torch.equal(before, self.weights(mean)))
                self.record(f"{name}/policy{step}", self.by_example(mean, whole(experiences()), SINGLE))
            self.record(f"{name}/trained_alike", torch.equal(self.weights(mean), self.weights(plain)))
            mean.save(self.folder / "checkpoints" / f"following-{stage}")
            again = self.engine(model, **settings)  # type: ignore[arg-type]
            again.start_ema_reference(0.75)
            again.load(self.folder / "checkpoints" / f"following-{stage}")
            for engine in (mean, again):
                self.step(engine, experiences(seed=9), FOUR)
                engine.update_ema()
            self.record(f"{name}/resumed", torch.equal(self.by_copy(mean), self.by_copy(again)))
            mean.start_ema_reference(0.0)
            self.step(mean, experiences(seed=10), FOUR)
            self.record(f"{name}/stale", self.by_copy(mean))
            mean.update_ema()
            self.record(f"{name}/refreshed", self.by_copy(mean))
            self.record(f"{name}/policy", self.by_example(mean, whole(experiences()), SINGLE))

    def by_copy(self, engine: DeepSpeedEngine) -> torch.Tensor:
        """Per-token outputs of all examples by the reference that follows `engine`."""
        with engine._ema.in_place_of_policy_weights():
            return self.by_example(engine, whole(experiences()), SINGLE)


def main() -> None:
    rank, world_size, port, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    init_distributed(rank, world_size, open_store(rank, "127.0.0.1", port, 120), device="cpu", timeout_s=120)
    scenarios = Scenarios(folder)
    chosen: list[Callable[[Scenarios], None]] = [Scenarios.gradients, Scenarios.offloads, experts]
    if world_size > 1:
        chosen += [
            Scenarios.ratio,
            Scenarios.not_finite,
            Scenarios.unmoved,
            Scenarios.exports,
            Scenarios.rewards,
            Scenarios.poisoned,
            Scenarios.ema_reference,
            resume,
            relaid,
            refused,
            adapters,
            large_model,
        ]
    for scenario in chosen:
        started = time.monotonic()
        scenario(scenarios)
        gc.collect()
        gc.freeze()  # DeepSpeed keeps engines, and collects garbage when it makes one
        print(f"{scenario.__name__}: {time.monotonic() - started:.1f} s", flush=True)  # noqa: T201
    save_file(scenarios.tensors, folder / f"results_{world_size}_{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
