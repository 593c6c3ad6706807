"""Feed-forward layers that compute a chunk of tokens at a time, and again in the backward pass (the tiled MLP of
Bekman et al. 2025). Their activations, four times their width for each token, are then those of one chunk.

Under ZeRO-3 each of these layers is gathered as one module (`partitioned_loading.py`), once in a pass however many
chunks it has: ranks with fewer tokens take part in the same collectives.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.config.models import ModelSection
from rlhf.errors import ModelError

NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "shared_mlp", "mlp_block")
"""What transformers' layers call the part that computes each token by itself."""
Result = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(slots=True)
class ChunkedForward:
    """The forward of a module, on chunks of tokens."""

    forward: Callable[..., Result]
    chunk_tokens: int

    def __call__(self, hidden: torch.Tensor, *inputs: object, **more: object) -> Result:
        """`hidden` [B, T, d]; other inputs [B, T, ...] are cut as well."""
        num_tokens = hidden.shape[1]
        if num_tokens <= self.chunk_tokens:
            return self.forward(hidden, *inputs, **more)
        parts = []
        for start in range(0, num_tokens, self.chunk_tokens):
            place = slice(start, start + self.chunk_tokens)

            def cut(value: object, place: slice = place) -> object:
                is_cut = isinstance(value, torch.Tensor) and value.shape[:2] == hidden.shape[:2]
                return value[:, place] if is_cut else value  # type: ignore[index]

            others = [cut(value) for value in inputs]
            named = {name: cut(value) for name, value in more.items()}
            forward = partial(self.forward, **named)
            part: Result = checkpoint(forward, cut(hidden), *others, use_reentrant=False, preserve_rng_state=False)
            parts.append(part)
        return _joined(parts)


def chunk_feed_forward(model: PreTrainedModel, section: ModelSection, where: str) -> None:
    """Let the feed-forward layers of `model` compute in chunks, if the section says so. Raises ModelError, which begins
    with the setting of the role of `where` (policy.model), if none of its layers is known."""
    if not section.mlp_chunk_tokens:
        return
    layers = [
        child
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer)
        for name, child in module.named_children()
        if name in NAMES
    ]
    if not layers:
        raise ModelError(
            f"{setting_of(where)}: a {type(model).__name__} has no feed-forward layer of a known name "
            f"({', '.join(NAMES)}). Set 0."
        )
    for layer in layers:
        layer.forward = ChunkedForward(layer.forward, section.mlp_chunk_tokens)


def setting_of(where: str) -> str:
    """The setting of the role of `where` (policy.model)."""
    return f"{where.rpartition('.')[0]}.mlp_chunk_tokens".lstrip(".")


def chunked_layers(model: nn.Module) -> list[str]:
    """Names of the modules that compute in chunks."""
    return [name for name, module in model.named_modules() if _chunked(module)]


@contextmanager
def chunks_of(model: nn.Module, num_tokens: int) -> Iterator[None]:
    """Inside this block the modules that compute in chunks take `num_tokens` at a time."""
    forwards = [forward for module in model.modules() if (forward := _chunked(module))]
    before = [forward.chunk_tokens for forward in forwards]
    for forward in forwards:
        forward.chunk_tokens = num_tokens
    try:
        yield
    finally:
        for forward, size in zip(forwards, before, strict=True):
            forward.chunk_tokens = size


def _chunked(module: nn.Module) -> ChunkedForward | None:
    forward = vars(module).get("forward")
    return forward if isinstance(forward, ChunkedForward) else None


def _joined(parts: Sequence[Result]) -> Result:
    """The outputs of all chunks, [B, n, ...] each; what routers say may be [n, ...]."""
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat([part for part in parts if isinstance(part, torch.Tensor)], dim=1)
    return tuple(torch.cat(items, dim=1 if items[0].ndim > 2 else 0) for items in zip(*parts, strict=True))
