"""Weights in 4 bits: what they are rounded to, what they take, and that the layer computes with nothing else."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from rlhf.engines.models.four_bit import FourBitLinear, four_bit_layers, full_weight, use_four_bit_layers
from tests.rounding import rounded
from tests.tiny_models import tiny_config

CPU = torch.device("cpu")
SHAPES = [(64, 128), (172, 64), (64, 96), (33, 17)]
"""The last two with blocks that end within a row, the last with one that is not full."""


def make_layer(out: int, into: int, dtype: torch.dtype = torch.float32) -> tuple[FourBitLinear, torch.Tensor]:
    """A packed layer with a bias, and the weight that it had."""
    torch.manual_seed(out)
    plain = nn.Linear(into, out, dtype=dtype).requires_grad_(False)
    weight = plain.weight.clone()
    layer = FourBitLinear(plain)
    layer.quantize(CPU)
    return layer, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "into"), SHAPES)
def test_a_weight_is_the_nearest_of_sixteen_fractions_of_its_scale(out: int, into: int, dtype: torch.dtype) -> None:
    layer, weight = make_layer(out, into, dtype)
    dequantized = layer.dequantized()
    assert dequantized.dtype == dtype
    assert layer.shape == dequantized.shape == weight.shape
    torch.testing.assert_close(dequantized, rounded(weight), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=0.0)
    assert not torch.equal(dequantized, weight)


def test_a_weight_takes_four_and_a_half_bits() -> None:
    layer, weight = make_layer(64, 128)
    assert layer.weight.nbytes * 8 == 4.5 * weight.numel()
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "into"), SHAPES)
def test_the_layer_equals_a_plain_one_with_the_dequantized_weight(out: int, into: int, dtype: torch.dtype) -> None:
    layer, _ = make_layer(out, into, dtype)
    inputs = torch.randn(2, 5, into, dtype=dtype, requires_grad=True)
    ours, plain = layer(inputs), linear(inputs, layer.dequantized(), layer.bias)
    assert torch.equal(ours, plain)
    upstream = torch.randn_like(ours)
    gradients = [torch.autograd.grad(one, inputs, upstream)[0] for one in (ours, plain)]
    torch.testing.assert_close(*gradients, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_the_layer_is_that_of_bitsandbytes() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer, weight = make_layer(172, 64)
    theirs = bnb.nn.Linear4bit(64, 172, quant_type="nf4", compress_statistics=False, compute_dtype=torch.float32)
    theirs.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=False)
    theirs.bias = layer.bias
    inputs = torch.randn(7, 64)
    torch.testing.assert_close(theirs.to("cpu")(inputs), layer(inputs), rtol=1e-5, atol=1e-6)


def test_no_dequantized_matrix_is_kept_for_the_backward_pass() -> None:
    layer, _ = make_layer(64, 128)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(3, 128, requires_grad=True))
    assert kept == []


@pytest.mark.parametrize(("out", "into"), SHAPES)
def test_a_layer_on_the_meta_device_has_the_same_shape(out: int, into: int) -> None:
    layer, _ = make_layer(out, into)
    sketch = FourBitLinear(nn.Linear(into, out, device="meta"))
    sketch.quantize(CPU)
    assert sketch.weight.is_meta
    assert (sketch.weight.shape, sketch.weight.dtype) == (layer.weight.shape, layer.weight.dtype)


def test_only_the_backbone_is_quantized() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config())
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    use_four_bit_layers(model)
    layers = four_bit_layers(model)
    for layer in layers.values():
        layer.quantize(CPU)
    assert set(layers) == {name for name in before if name.endswith("proj.weight")}
    for name, parameter in model.named_parameters():
        expected = rounded(before[name]) if name in layers else before[name]
        torch.testing.assert_close(full_weight(layers.get(name), parameter), expected, rtol=1e-6, atol=0.0)
