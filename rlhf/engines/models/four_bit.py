"""Linear layers whose frozen weights are held in 4 bits: NormalFloat (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

Of each block of 64 weights the largest magnitude is kept in float32, and of each weight which of 16 shares of it comes
nearest: 4.5 bits a weight. The kernels are those of bitsandbytes. What computes is a matrix of the layer's own dtype,
unpacked where it is used and thrown away after.
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
    """A linear layer whose weight `pack` takes into 4 bits: uint8 [bytes], the scales of all blocks and then two
    weights a byte. One flat parameter, so that it is sent, sharded and digested as any other."""

    def __init__(self, layer: nn.Linear) -> None:
        """Take over the parameters of `layer`, which need not have memory yet."""
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.dtype = layer.weight.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight as it computes: [out, in]."""
        return self.out_features, self.in_features

    @torch.no_grad()
    def pack(self, device: torch.device) -> None:
        """Hold the weight in 4 bits from now on, on `device`; where it has no memory, have the shape of that."""
        size = self.weight.numel()
        if self.weight.is_meta:
            held = torch.empty(_scale_bytes(size) + ceil(size / 2), dtype=torch.uint8, device="meta")
        else:
            weight = self.weight.detach().to(device).contiguous()
            codes, state = _kernels().quantize_4bit(weight, blocksize=BLOCK, quant_type=CODE)
            held = torch.cat([state.absmax.view(torch.uint8), codes.flatten()])
        self.weight = nn.Parameter(held, requires_grad=False)

    @torch.no_grad()
    def unpacked(self) -> torch.Tensor:
        """The weight as it computes, [out, in]. Under ZeRO-3 its parameter must have been gathered."""
        held = self.weight.detach()
        numel = self.in_features * self.out_features
        size = _scale_bytes(numel)
        scales = held[:size].clone().view(torch.float32)  # what is gathered may begin at any byte
        kernels = _kernels()
        # As one row: on CPU the kernel begins a block with every row.
        state = kernels.QuantState(scales, (numel,), dtype=self.dtype, blocksize=BLOCK, quant_type=CODE)
        matrix: torch.Tensor = kernels.dequantize_4bit(held[size:].view(-1, 1), state)
        return matrix.view(self.shape)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = _Product.apply(inputs, self)  # type: ignore[no-untyped-call]
        return outputs


class _Product(torch.autograd.Function):
    """inputs @ weight.T + bias, of which the inputs alone have a gradient. The backward pass unpacks the weight anew:
    kept, it would take more than packing saved."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, layer: FourBitLinear) -> torch.Tensor:
        ctx.layer = layer
        return linear(inputs, layer.unpacked(), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] @ ctx.layer.unpacked(), None


def hold_in_four_bits(model: PreTrainedModel) -> None:
    """Let the linear layers of the backbone of `model` be ones that can be packed. The layer that makes logits or
    scores, embeddings and norms stay as they are."""
    for name in linear_layers(model):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        holder, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(holder), leaf, FourBitLinear(layer))


def four_bit_layers(module: nn.Module) -> dict[str, FourBitLinear]:
    """The layers held in 4 bits, by the name of their weight."""
    return {f"{name}.weight": layer for name, layer in module.named_modules() if isinstance(layer, FourBitLinear)}


def whole_weight(layer: FourBitLinear | None, parameter: torch.Tensor) -> torch.Tensor:
    """`parameter` as it computes, which is held by `layer` where that is one that packs."""
    return parameter.detach() if layer is None else layer.unpacked()


def _scale_bytes(numel: int) -> int:
    return SCALE_BYTES * ceil(numel / BLOCK)


def _kernels() -> ModuleType:
    return import_module("bitsandbytes.functional")  # takes a second, and most runs have nothing in 4 bits
