"""Decodes a batch of prompts token by token, with a KV cache, by a causal language model or a mixture of two."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from rlhf.types import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Decoder(Protocol):
    """Gives logits token by token."""

    def prefill(self) -> torch.Tensor:
        """Logits [B, V] of each prompt's first response token."""
        ...

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append `tokens` [B]; logits [B, V] of the next."""
        ...

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only the rows with these indices."""
        ...


class GrowingCacheLayer(DynamicLayer):
    """The KV cache [B, H, T, D] of one layer, in a buffer that doubles when it is full. It needs up to twice the
    memory, but appending a token does not copy the others, as `torch.cat` would."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of T' tokens; returns those of all tokens."""
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < end or not self._is_in(self._buffers[0]):
            held = (self.keys, self.values) if length else (None, None)
            self._buffers = _allocate(key_states, 2 * end, held[0]), _allocate(value_states, 2 * end, held[1])
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., length:end, :] = new
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def _is_in(self, buffer: torch.Tensor) -> bool:
        """Whether the current keys are a view of this buffer; after rows were dropped or reordered they are a copy."""
        return self.keys is not None and self.keys.data_ptr() == buffer.data_ptr()


def _allocate(like: torch.Tensor, length: int, held: torch.Tensor | None) -> torch.Tensor:
    """A buffer [B, H, `length`, D] that begins with `held`."""
    buffer = like.new_empty((*like.shape[:-2], length, like.shape[-1]))
    if held is not None:
        buffer[..., : held.shape[-2], :] = held
    return buffer


class ModelDecoder:
    """A batch of B prompts, padded on the left, and their KV cache."""

    def __init__(
        self,
        model: "PreTrainedModel",
        prompts: Sequence[IntArray],
        device: torch.device,
    ) -> None:
        width = max(len(prompt) for prompt in prompts)
        ids = np.zeros((len(prompts), width), dtype=np.int64)
        mask = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        self._model = model
        self._ids = torch.from_numpy(ids).to(device)
        self._mask = torch.from_numpy(mask).to(device)
        self._positions = (self._mask.cumsum(-1) - 1).clamp_(min=0)
        self._cache = DynamicCache(config=model.config)
        # Sliding-window and recurrent layers keep their own cache classes.
        self._cache.layers = [GrowingCacheLayer() if type(one) is DynamicLayer else one for one in self._cache.layers]

    def prefill(self) -> torch.Tensor:
        """Logits [B, V] of each prompt's first response token."""
        return self._forward(self._ids, self._positions)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append `tokens` [B]; logits [B, V] of the next."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=-1)
        self._positions = self._positions[:, -1:] + 1
        return self._forward(tokens[:, None], self._positions)

    def keep(self, rows: torch.Tensor) -> None:
        """Keep only the rows with these indices."""
        self._mask, self._positions = self._mask[rows], self._positions[rows]
        self._cache.batch_select_indices(rows)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cast(torch.Tensor, out.logits[:, -1])


class MixedDecoder:
    """The geometric mixture of two models: logits (1 - share) * policy + share * reference, in float32."""

    def __init__(self, policy: Decoder, reference: Decoder, shares: torch.Tensor) -> None:
        """`shares` is [B, 1]."""
        self._policy = policy
        self._reference = reference
        self._shares = shares

    def prefill(self) -> torch.Tensor:
        return self._mix(self._policy.prefill(), self._reference.prefill())

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._mix(self._policy.decode(tokens), self._reference.decode(tokens))

    def keep(self, rows: torch.Tensor) -> None:
        self._policy.keep(rows)
        self._reference.keep(rows)
        self._shares = self._shares[rows]

    def _mix(self, policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return (1.0 - self._shares) * policy.float() + self._shares * reference.float()
