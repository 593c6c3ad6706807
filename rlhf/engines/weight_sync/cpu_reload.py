"""Reloads a vLLM model on CPU without allocating new memory. Imported in vLLM's workers only.

On CPU every linear layer multiplies by a packed copy of its weight (oneDNN), which vLLM makes after loading; only the
packed copy is kept, except for embeddings and heads. vLLM's layerwise reload allocates a new weight for each layer,
packs it into a new copy, and frees the old copy at the end. The blocks that it frees have other sizes than the blocks
that it needs next, so memory fragments and grows.
"""

import torch
from torch.overrides import TorchFunctionMode
from vllm.config import ModelConfig
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from rlhf.engines.weight_sync.complete import require_none
from rlhf.engines.weight_sync.gloo_group import BufferPool
from rlhf.engines.weight_sync.gpt_oss import load_sinks_in_place

PACKED = "cpu_linear"
"""The layer attribute that multiplies by the packed copy."""
LARGE = 1 << 20
"""Bytes; smaller tensors are allocated as usual."""


class CpuReload:
    """Reloads a model, any number of times.

    The old packed copies are freed first, so that the new ones use their memory. The unpacked weights in between share
    one buffer. A layer that keeps its weight (an embedding or a head) is loaded in place: at the end, vLLM treats it as
    a layer that was never loaded, and packs it. A head that is tied to the embedding needs this too: it is never loaded
    itself, and would keep multiplying by the old copy.

    Experts are packed by their kernel. vLLM builds it for the first weights only, and copies later ones over the packed
    ones as they are; without the old kernel, it builds one again.
    """

    def __init__(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        self._model = model
        self._model_config = model_config
        self._packed = {name: layer for name, layer in model.named_modules() if PACKED in vars(layer)}
        self._experts = {
            name: layer for name, layer in model.named_modules() if _is_computed_by(layer, UnquantizedFusedMoEMethod)
        }
        linear = [layer for layer in model.modules() if _is_computed_by(layer, UnquantizedLinearMethod)]
        weights = [weight for layer in linear for weight in get_layerwise_info(layer).restore_metadata[0].values()]
        self.scratch = Scratch(max((weight.nbytes for weight in weights), default=0))
        """Enter it while weights are loaded."""

    def begin(self) -> None:
        """Prepare every layer to take new weights."""
        for layer in self._packed.values():
            vars(layer).pop(PACKED, None)  # already removed if the last update failed
        for layer in self._experts.values():
            layer.quant_method.moe_kernel = None
        for layer in self._model.modules():
            if _is_computed_by(layer, UnquantizedEmbeddingMethod):
                get_layerwise_info(layer).load_numel_total = 0
        load_sinks_in_place(self._model)
        initialize_layerwise_reload(self._model)

    def end(self) -> None:
        """End the reload: layers that got weights are ready to compute, the others stay as they are."""
        finalize_layerwise_reload(self._model, self._model_config)

    def require_complete(self) -> None:
        """Raise WeightSyncError that names the linear layers and experts without weights. (An embedding keeps its old
        weights.)"""
        bare = [name for name, layer in self._packed.items() if PACKED not in vars(layer)]
        bare += [name for name, layer in self._experts.items() if layer.quant_method.moe_kernel is None]
        require_none(bare)


class Scratch(TorchFunctionMode):
    """Inside this mode a large tensor from `torch.empty_strided` reuses a buffer of the pool, if no tensor views it."""

    def __init__(self, nbytes: int) -> None:
        """For tensors of at most `nbytes`; larger ones are allocated as usual."""
        super().__init__()
        self._pool = BufferPool(nbytes)

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is not torch.empty_strided:
            return func(*args, **kwargs)
        like = func(*args, **{**kwargs, "device": "meta"})
        if not (LARGE <= like.nbytes <= self._pool.nbytes and like.is_contiguous()):
            return func(*args, **kwargs)
        return self._pool.take(like.nbytes).view(like.dtype).view(like.shape)


def _is_computed_by(layer: torch.nn.Module, method: type) -> bool:
    return isinstance(getattr(layer, "quant_method", None), method)
