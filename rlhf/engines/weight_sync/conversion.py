"""Which tensors of a model are converted together when they get the names and shapes of a checkpoint.

Transformers renames, splits and joins tensors while it loads: the experts of a layer, one tensor each on disk, are one
tensor in memory. Its reverse conversion is a function of all tensors; here they are divided into the smallest groups
that can be converted one after the other, so that nobody has to hold the whole model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from rlhf.engines.weight_sync.buckets import layer_of

Convert = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class ConversionGroup:
    """Tensors that are converted together. In memory and as they are stored they have the same number of elements."""

    held: tuple[str, ...]
    """Their names in memory."""
    stored: Mapping[str, torch.Tensor]
    """Names and tensors of the checkpoint, on the meta device, in the order in which they lie in memory: parts of one
    tensor need not be moved."""

    @property
    def layout(self) -> set[tuple[str, torch.Size]]:
        """Names and shapes of what is stored."""
        return {(name, tensor.shape) for name, tensor in self.stored.items()}


def conversion_groups(held: Mapping[str, torch.Tensor], convert: Convert) -> list[ConversionGroup]:
    """Divide `held`, tensors on the meta device by their names in memory, into groups: each tensor by itself where
    `convert` makes of the tensors of its layer, one by one, what it makes of them together; else the whole layer."""
    return [group for layer in _layers(tuple(held)) for group in _groups_of(layer, held, convert)]


def _groups_of(layer: Sequence[str], held: Mapping[str, torch.Tensor], convert: Convert) -> Iterator[ConversionGroup]:
    whole = _group(layer, held, convert)
    alone = [_group([name], held, convert) for name in layer]
    yield from alone if set().union(*(group.layout for group in alone)) == whole.layout else [whole]


def _group(names: Sequence[str], held: Mapping[str, torch.Tensor], convert: Convert) -> ConversionGroup:
    found = convert({name: held[name] for name in names})
    in_order = sorted(found, key=lambda name: found[name].storage_offset())
    return ConversionGroup(tuple(names), {name: found[name] for name in in_order})


def _layers(names: Sequence[str]) -> list[list[str]]:
    """The names of each layer; one outside the layers is by itself."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(layer_of(name) or name, []).append(name)
    return list(layers.values())
