"""Runs a model in another number format without a second copy of it: each layer's weights are converted when the layer
starts and restored when it ends. Under ZeRO-3 they are gathered for the same time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlhf.engines.models.adapter_names import adapted_tensors
from rlhf.engines.models.four_bit import FourBitLinear
from rlhf.engines.models.gathering import TOGETHER_BYTES, is_partitioned, whole_ones


def finer_than(dtype: torch.dtype, root: nn.Module) -> torch.dtype:
    """The next finer format that `root` can be computed in beside `dtype`. A float32 model that ZeRO-3 partitions stays
    in float32: a layer in float64 beside the gathered one would need more memory than training does."""
    if dtype != torch.float32:
        return torch.float32
    return torch.float32 if any(map(is_partitioned, root.parameters())) else torch.float64


@contextmanager
def at_least(dtype: torch.dtype, root: nn.Module) -> Iterator[None]:
    """Inside this block `root` computes in `dtype`, or finer where it has finer weights; without gradients. Collective
    under ZeRO-3, which must not have installed its own hooks yet."""
    with torch.no_grad(), ExitStack() as handles:
        for block in _blocks(root):
            opened: list[ExitStack] = []
            before = block.module.register_forward_pre_hook(_opens(block, dtype, opened))
            after = block.module.register_forward_hook(_closes(opened), always_call=True)
            handles.callback(before.remove)
            handles.callback(after.remove)
        yield


@dataclass(frozen=True, slots=True)
class _Block:
    """What is converted at once, when `module` starts."""

    module: nn.Module
    tensors: Sequence[torch.Tensor]
    layers: Sequence[nn.Module]


def _opens(block: _Block, dtype: torch.dtype, opened: list[ExitStack]) -> Callable[..., None]:
    def hook(*_: object) -> None:
        stack = ExitStack()
        opened.append(stack)
        for tensor in block.tensors:
            stack.callback(setattr, tensor, "data", tensor.data)
        shards = [tensor for tensor in block.tensors if isinstance(tensor, nn.Parameter) and is_partitioned(tensor)]
        for parameter, gathered in zip(shards, whole_ones(shards) if shards else (), strict=True):
            parameter.data = gathered
        for tensor in block.tensors:
            if tensor.is_floating_point() and tensor.itemsize < dtype.itemsize:
                tensor.data = tensor.data.to(dtype)
        for layer in block.layers:
            if isinstance(layer, FourBitLinear) and layer.dtype.itemsize < dtype.itemsize:
                stack.callback(setattr, layer, "dtype", layer.dtype)
                layer.dtype = dtype

    return hook


def _closes(opened: list[ExitStack]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        opened.pop().close()

    return hook


def _blocks(root: nn.Module) -> Iterator[_Block]:
    """Whole layers, whose modules may also use each other's weights without calling each other. Under ZeRO-3, where
    layers are large, each module by itself, as in training, but for experts and their adapters."""
    whole: Iterable[nn.Module] = _layers(root)
    if any(map(is_partitioned, root.parameters())):
        whole = list(filter(_is_small, whole))
        inside = {part for module in whole for part in module.modules()}
        whole += [module for _, module in adapted_tensors(root) if module not in inside]
        inside |= {part for module in whole for part in module.modules()}
        for module in root.modules():
            if module not in inside:
                yield _Block(module, [*module.parameters(recurse=False), *module.buffers(recurse=False)], [module])
    for module in whole:
        yield _Block(module, [*module.parameters(), *module.buffers()], list(module.modules()))


def _is_small(module: nn.Module) -> bool:
    """Whether its partitioned parameters, once gathered, are no matter."""
    parameters = filter(is_partitioned, module.parameters())
    size = sum(int(vars(parameter)["ds_numel"]) * parameter.itemsize for parameter in parameters)
    return size <= TOGETHER_BYTES


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Layers of a model's stacks, and what holds parameters outside of them."""
    if next(module.parameters(recurse=False), None) is not None:
        yield module
        return
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)
