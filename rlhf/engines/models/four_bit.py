"""Linear layers with frozen 4-bit weights: NormalFloat, nf4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

A block of 64 weights stores its largest magnitude in float32 (the scale), and for each weight the index of the nearest
of 16 fractions of the scale: 4.5 bits for each weight. The kernels are those of bitsandbytes. Each use of a weight
dequantizes it to the layer's dtype, and discards the result.
"""

from importlib import import_module
from math import ceil
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from rlhf.engines.models.adapter_names import linear_layers

BLOCK = 64
"""Weights that share a scale."""
CODE = "nf4"
SCALE_BYTES = 4


class FourBitLinear(nn.Linear):
    """A linear layer whose weight `quantize` converts to 4 bits: uint8 [bytes], the scales of all blocks followed by
    two weights in each byte. It is one flat parameter, so it is broadcast, partitioned and hashed like any other."""

    def __init__(self, layer: nn.Linear) -> None:
        """Take over the parameters of `layer`, which may be on the meta device."""
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.dtype = layer.weight.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the dequantized weight: [out, in]."""
        return self.out_features, self.in_features

    @torch.no_grad()
    def quantize(self, device: torch.device) -> None:
        """Convert the weight to 4 bits, on `device`; on the meta device only its shape changes."""
        size = self.weight.numel()
        if self.weight.is_meta:
            held = torch.empty(_scale_bytes(size) + ceil(size / 2), dtype=torch.uint8, device="meta")
        else:
            weight = self.weight.detach().to(device).contiguous()
            codes, state = _kernels().quantize_4bit(weight, blocksize=BLOCK, quant_type=CODE)
            held = torch.cat([state.absmax.view(torch.uint8), codes.flatten()])
        self.weight = nn.Parameter(held, requires_grad=False)

    @torch.no_grad()
    def dequantized(self) -> torch.Tensor:
        """The weight [out, in] in the layer's dtype. Under ZeRO-3 its parameter must be gathered."""
        held = self.weight.detach()
        numel = self.in_features * self.out_features
        size = _scale_bytes(numel)
        scales = held[:size].clone().view(torch.float32)  # a gathered parameter may be unaligned
        kernels = _kernels()
        # As one row: on CPU the kernel starts a new block with every row.
        state = kernels.QuantState(scales, (numel,), dtype=self.dtype, blocksize=BLOCK, quant_type=CODE)
        matrix: torch.Tensor = kernels.dequantize_4bit(held[size:].view(-1, 1), state)
        return matrix.view(self.shape)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = _Product.apply(inputs, self)  # type: ignore[no-untyped-call]
        return outputs


class _Product(torch.autograd.Function):
    """inputs @ weight.T + bias, with a gradient for the inputs only. The backward pass dequantizes the weight again:
    keeping it would use more memory than quantization saves."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, layer: FourBitLinear) -> torch.Tensor:
        ctx.layer = layer
        return linear(inputs, layer.dequantized(), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ ctx.layer.dequantized(), None


def use_four_bit_layers(model: PreTrainedModel) -> None:
    """Replace the linear layers of the backbone of `model` by layers that can be quantized. The output layer (logits or
    scores), embeddings and norms stay as they are."""
    for name in linear_layers(model):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        holder, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(holder), leaf, FourBitLinear(layer))


def four_bit_layers(module: nn.Module) -> dict[str, FourBitLinear]:
    """The 4-bit layers, by the name of their weight."""
    return {f"{name}.weight": layer for name, layer in module.named_modules() if isinstance(layer, FourBitLinear)}


def full_weight(layer: FourBitLinear | None, parameter: torch.Tensor) -> torch.Tensor:
    """`parameter` in full precision: dequantized if it belongs to the 4-bit `layer`."""
    return parameter.detach() if layer is None else layer.dequantized()


def _scale_bytes(numel: int) -> int:
    return SCALE_BYTES * ceil(numel / BLOCK)


def _kernels() -> ModuleType:
    return import_module("bitsandbytes.functional")  # takes a second, and most runs do not quantize
