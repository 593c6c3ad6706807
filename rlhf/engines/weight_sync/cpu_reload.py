"""Loading a vLLM model on the CPU anew, in the memory that it has. Imported only inside vLLM's workers.

There every linear layer multiplies by a packed copy of its weight (oneDNN), made by the method that processes a layer's
weights after loading; that copy is all that is kept, but for embeddings and heads. By itself a layerwise reload makes a
new weight of each layer, from it a new copy, and lets go of the old one in the end; what is freed in between has holes
of other sizes than what is needed next.
"""

import torch
from torch.overrides import TorchFunctionMode
from vllm.config import ModelConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from rlhf.engines.weight_sync.gloo_group import BufferPool
from rlhf.errors import WeightSyncError

PACKED = "cpu_linear"
"""The attribute of a layer that multiplies by the packed copy."""
LARGE = 1 << 20
"""Bytes; smaller tensors are not worth the care."""


class CpuReload:
    """A model while it is loaded anew, again and again.

    The packed copies go first, and their memory takes the new ones. The weights that are needed in between take turns
    in one buffer. What keeps its weight is loaded into it: vLLM takes such a layer, at the end, for one that was never
    loaded, and packs it. That is also what a head needs whose weight is the embedding's: it is never loaded itself,
    and would go on multiplying by the old copy.
    """

    def __init__(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        self._model = model
        self._model_config = model_config
        self._packed = {name: layer for name, layer in model.named_modules() if PACKED in vars(layer)}
        linear = [layer for layer in model.modules() if _is_computed_by(layer, UnquantizedLinearMethod)]
        weights = [weight for layer in linear for weight in get_layerwise_info(layer).restore_metadata[0].values()]
        self.scratch = Scratch(max((weight.nbytes for weight in weights), default=0))
        """To be entered while weights are loaded."""

    def begin(self) -> None:
        """Have every layer wait for its weights."""
        for layer in self._packed.values():
            vars(layer).pop(PACKED, None)  # gone already where the last update broke off
        for layer in self._model.modules():
            if _is_computed_by(layer, UnquantizedEmbeddingMethod):
                get_layerwise_info(layer).load_numel_total = 0
        initialize_layerwise_reload(self._model)

    def end(self) -> None:
        """Leave the layers as they are, those that got weights ready to compute."""
        finalize_layerwise_reload(self._model, self._model_config)

    def require_whole(self) -> None:
        """Raises WeightSyncError that names linear layers without weights. (An embedding keeps those that it had.)"""
        if bare := [name for name, layer in self._packed.items() if PACKED not in vars(layer)]:
            raise WeightSyncError(f"{len(bare)} layers got no weights: {', '.join(bare[:3])}{' ...' * (len(bare) > 3)}")


class Scratch(TorchFunctionMode):
    """Inside, a large tensor that is made out of nothing lies in a buffer that was used before, if nobody looks into it
    any more."""

    def __init__(self, nbytes: int) -> None:
        """Of at most so many bytes; larger ones are made as ever."""
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
