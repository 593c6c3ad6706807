"""How a vLLM model of gpt-oss takes new weights. Imported in vLLM's workers only.

Its loader copies some weights past the loaders of its parameters. A reload of layers counts what these load: it takes
the layer for one without new weights, and keeps the old ones, with a warning in the log.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts, OAIAttention

FUSED = tuple(f".experts.{name}{end}" for name in ("gate_up_proj", "down_proj") for end in ("", "_bias"))
"""How names of tensors with all experts of a layer end."""


class LoadableModel(Protocol):
    """A vLLM model: takes weights by name."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]: ...


class SingleExperts:
    """Loads experts one by one: those go through the loaders of their parameters."""

    def __init__(self, model: LoadableModel) -> None:
        self._model = model

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return self._model.load_weights(one_by_one(weights))


def reloadable(model: LoadableModel) -> LoadableModel:
    """What loads weights into a model in a way that a reload of its layers notices."""
    assert isinstance(model, torch.nn.Module)
    is_fused = any(isinstance(layer, GptOssRoutedExperts) for layer in model.modules())
    return SingleExperts(model) if is_fused else model


def load_sinks_in_place(model: torch.nn.Module) -> None:
    """Before each reload: leave attention sinks, which have no such loader, where they are."""
    for layer in model.modules():
        if isinstance(layer, OAIAttention):
            get_layerwise_info(layer).load_numel_total = 0


def one_by_one(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, with one [...] for each expert in place of [num_experts, ...]."""
    for name, weight in weights:
        if name.endswith(FUSED):
            layer, _, kind = name.rpartition(".")
            yield from ((f"{layer}.{index}.{kind}", expert) for index, expert in enumerate(weight))
        else:
            yield name, weight
