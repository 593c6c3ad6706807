"""No step on gradients that are not finite, and norms that copy nothing."""

import math

import pytest
import torch
import torch.distributed as dist

from rlhf.engines.training.step_guard import GradientWatch, StepGuard


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, whose word is that of all."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_gradient_of_a_window_is_seen_and_forgotten_with_it(dtype: torch.dtype, bad: float) -> None:
    weights = {name: torch.nn.Parameter(torch.ones(3, 2, dtype=dtype)) for name in "ab"}
    watch = GradientWatch(weights, torch.device("cpu"))
    for factor, is_fine in ((1.0, True), (bad, False), (-1.0, True)):
        scale = torch.ones(3, 2, dtype=dtype)
        scale[1, 1] = factor
        (weights["a"] + scale * weights["b"]).sum().backward()
        (weights["a"] + weights["b"]).sum().backward()  # a fine micro-batch of the same window hides nothing
        assert watch.end_window() is is_fine


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_stage_0_clips_by_the_norm_over_all_gradients(clip: float) -> None:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((5, 3), (7,), (1,))]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    guard = StepGuard(optimizer, clip)
    gradients = [torch.randn_like(weight) for weight in weights]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.clone()
    norm = math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in gradients))
    optimizer.step()
    assert guard.norm == pytest.approx(norm, rel=1e-12)
    factor = clip / norm if clip else 1.0
    for weight, gradient in zip(weights, gradients, strict=True):
        torch.testing.assert_close(weight.data, -gradient * factor, rtol=1e-5, atol=0)
