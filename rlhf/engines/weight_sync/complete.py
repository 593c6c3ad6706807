"""Whether a reload of a vLLM model reached its layers. Imported in vLLM's workers only."""

from collections.abc import Sequence

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from rlhf.errors import WeightSyncError


def layers_without_weights(model: torch.nn.Module) -> list[str]:
    """The linear layers and experts that got nothing in a reload that is about to be finalized: that would give them
    their old weights back, with a warning in the log. (Heads that are tied to the embedding rightly get nothing.)"""
    infos = {
        name: get_layerwise_info(layer)
        for name, layer in model.named_modules()
        if isinstance(layer, LinearBase | RoutedExperts)
    }
    return [name for name, info in infos.items() if info.load_numel_total and not info.load_numel]


def require_none(bare: Sequence[str]) -> None:
    """Raise WeightSyncError that names layers without weights, if there are any."""
    if bare:
        raise WeightSyncError(f"{len(bare)} layers got no weights: {', '.join(bare[:3])}{' ...' * (len(bare) > 3)}")
