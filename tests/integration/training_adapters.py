"""What the training engine's worker does with adapters: learn, export, save, load."""

from typing import TYPE_CHECKING

import torch

from rlhf.engines.models.adapters import adapters_of
from rlhf.engines.models.finite_weights import local_shard
from rlhf.types import Head
from tests.integration.expected_errors import error_of
from tests.integration.training_rows import experiences, rankings, whole

if TYPE_CHECKING:
    from rlhf.engines.training.engine import DeepSpeedEngine
    from tests.integration.training_worker import Scenarios

LORA: dict[str, dict[str, object]] = {
    "tied": {"rank": 4, "alpha": 8.0},
    "experts": {
        "rank": 4,
        "alpha": 8.0,
        "targets": ("q_proj", "k_proj", "v_proj", "o_proj", "experts.gate_up_proj", "experts.down_proj"),
    },
}
"""Adapters of each model."""
CASES = (
    *(("tied", stage, "float32", "none") for stage in (0, 2, 3)),
    *(("tied", stage, "float32", "nf4") for stage in (0, 2, 3)),
    *(("experts", stage, "float32", "none") for stage in (0, 2, 3)),
    *(("tied", 3, "bfloat16", "none"), ("tied", 3, "bfloat16", "nf4"), ("experts", 3, "bfloat16", "none")),
)
"""Model, ZeRO stage, dtype and quantization."""
GRADIENTS = {"tied": "tied-{}-float32-none", "rounded": "tied-{}-float32-nf4", "experts": "experts-{}-float32-none"}
"""Model that one process computes with -> cases of which the gradient is its own, but for the stage."""
LIMIT = (20, None)
ALL = (1000, None)


def frozen(engine: "DeepSpeedEngine") -> torch.Tensor:
    """This rank's part of everything that must not learn."""
    return torch.cat([local_shard(p).flatten().clone() for p in engine.module.parameters() if not p.requires_grad])


def adapters(scenarios: "Scenarios") -> None:
    """Two steps, an export, a save, a load into a fresh engine, and a third step of both."""
    expected: dict[tuple[str, str], torch.Tensor] = {}
    for model, stage, dtype, quantization in CASES:
        case = f"{model}-{stage}-{dtype}-{quantization}"
        name = f"adapters/{case}"
        settings: dict[str, object] = {"zero_stage": stage, "dtype": dtype, "quantization": quantization, "lr": 1e-2}
        settings |= {"lora": LORA[model], "gradient_checkpointing": model == "experts"}
        engine = scenarios.engine(model, **settings)  # type: ignore[arg-type]
        first = scenarios.by_example(engine, whole(experiences()), ALL)
        plain = ("rounded" if quantization == "nf4" else model, dtype)
        if plain not in expected:
            expected[plain] = scenarios.by_example(scenarios.engine(plain[0], dtype=dtype), whole(experiences()), ALL)
        scenarios.record(f"{name}/starts_off_by", float((first - expected[plain]).abs().max()))
        before = frozen(engine)
        _, report = scenarios.step(engine, experiences(), LIMIT)
        scenarios.record(f"{name}/norm", report.grad_norm)
        scenarios.record(f"{name}/num_unmoved", len(report.unmoved))
        scenarios.step(engine, experiences(seed=1), ALL)
        scenarios.record(f"{name}/frozen", torch.equal(before, frozen(engine)))
        folder = scenarios.folder / "exports" / f"adapters-{case}"
        engine.export(folder)
        engine.check_export(folder)
        scenarios.record(f"{name}/outputs", scenarios.by_example(engine, whole(experiences()), ALL))
        checkpoint = scenarios.folder / "checkpoints" / f"adapters-{case}"
        engine.save(checkpoint)
        again = scenarios.engine(model, **settings)  # type: ignore[arg-type]
        frozen_one = "model.norm" if quantization == "none" else "model.layers.0.self_attn.q_proj.base_layer"
        part = local_shard(again.module.get_parameter(f"{frozen_one}.weight"))
        right = part.clone()
        part.add_(1)
        refused = error_of(again.load, checkpoint)
        scenarios.record(f"{name}/refuses_another_model", "saved with other frozen weights" in refused)
        part.copy_(right)
        again.load(checkpoint)
        scenarios.record(f"{name}/saved_bytes", sum(path.stat().st_size for path in checkpoint.rglob("*.pt")))
        for one in (engine, again):
            scenarios.step(one, experiences(seed=2), ALL)
        scenarios.record(f"{name}/resumed", torch.equal(scenarios.weights(engine), scenarios.weights(again)))
    critic = scenarios.engine("untied", Head.SCORES, zero_stage=3, lora={"rank": 2, "targets": ("q_proj", "v_proj")})
    head = critic.module.get_parameter("score.weight")
    before = local_shard(head).clone()
    scenarios.step(critic, rankings(), LIMIT, "reward")
    scenarios.record("adapters/head_learns", not torch.equal(before, local_shard(head)))
    scenarios.record("adapters/num_targets", len(adapters_of(critic.module)))
