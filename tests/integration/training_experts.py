"""What the training engine's worker does with mixtures of experts: balance, freeze and use their routers."""

from typing import TYPE_CHECKING

import torch

from rlhf.engines.process.distributed import deepspeed
from rlhf.engines.training.router_balance import BALANCE
from tests.integration import list_experts  # noqa: F401  registers the model
from tests.integration.training_rows import experiences

if TYPE_CHECKING:
    from rlhf.engines.training.engine import DeepSpeedEngine
    from tests.integration.training_worker import Scenarios

COEF = 0.5
FOUR, PACKED, SINGLE = (20, None), (1000, None), (1, 1)
CASES = (
    ("experts", 0, FOUR),
    ("experts", 3, PACKED),
    ("experts", 3, SINGLE),
    ("unpacked_experts", 3, FOUR),
)
"""Model, ZeRO stage and limits. One rank has one micro-batch if PACKED; of the second model each sequence takes a pass
of its own."""


def experts(scenarios: "Scenarios") -> None:
    """A step with a load-balancing loss, one of ranks that call different experts, and one with frozen routers."""
    for model, stage, limit in CASES:
        engine = scenarios.engine(
            model, router_aux_coef=COEF, zero_stage=stage, max_grad_norm=0.0, adam_betas=(0.0, 0.95)
        )
        metrics, _ = scenarios.step(engine, experiences(), limit)
        name = f"experts/{model}-zero{stage}-{limit[0]}"
        scenarios.record(f"{name}/balance", metrics.sums[BALANCE])
        for parameter, gradient in scenarios.gradient(engine).items():
            scenarios.record(f"{name}/grad/{parameter}", gradient)
    if scenarios.num_ranks > 1:
        apart = scenarios.engine("list_experts", zero_stage=3, max_grad_norm=0.0, adam_betas=(0.0, 0.95))
        scenarios.step(apart, experiences(), SINGLE)
        for parameter, gradient in scenarios.gradient(apart).items():
            scenarios.record(f"gradients/list_experts/grad/{parameter}", gradient)
    for stage in (0, 3):
        frozen = scenarios.engine("experts", zero_stage=stage, lr=1e-2, freeze_router=True)
        free = scenarios.engine("experts", zero_stage=stage, lr=1e-2)
        before = routers(frozen)
        reports = [scenarios.step(engine, experiences(), FOUR)[1] for engine in (frozen, free)]
        for kind, engine in (("frozen", frozen), ("free", free)):
            moved = [float(not torch.equal(*pair)) for pair in zip(before, routers(engine), strict=True)]
            scenarios.record(f"experts/routers{stage}/{kind}", torch.tensor(moved))
        scenarios.record(f"experts/routers{stage}/unmoved", float(sum(len(report.unmoved) for report in reports)))


def routers(engine: "DeepSpeedEngine") -> list[torch.Tensor]:
    """The weight of each router, whole. Collective under ZeRO-3."""
    found = []
    for name, parameter in engine.module.named_parameters():
        if name.endswith("mlp.gate.weight"):
            with deepspeed.zero.GatheredParameters([parameter]):
                found.append(parameter.detach().clone())
    return found
