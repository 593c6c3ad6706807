"""One token after another by a causal language model, or by a mixture of two, for a batch of prompts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from rlhf.types import IntArray

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Decoder(Protocol):
    """Logits, token by token."""

    def prefill(self) -> torch.Tensor:
        """Logits [B, V] of each prompt's first answer token."""
        ...

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append `tokens` [B]; logits [B, V] of the next."""
        ...

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but those."""
        ...


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """The keys and values [B, H, T, D] of one layer, in room that is taken ahead and doubled when it is full, at the
    price of up to twice the memory. To put each token behind the others by `torch.cat` copies all of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put T' more behind those that are held; returns all of them."""
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < end or not self._is_in(self._room[0]):
            held = (self.keys, self.values) if length else (None, None)
            self._room = _with_room(key_states, 2 * end, held[0]), _with_room(value_states, 2 * end, held[1])
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[..., length:end, :] = new
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = (room[..., :end, :] for room in self._room)
        return self.keys, self.values

    def _is_in(self, room: torch.Tensor) -> bool:
        """Whether what is held lies there: rows that were dropped or moved leave a copy elsewhere."""
        return self.keys is not None and self.keys.data_ptr() == room.data_ptr()


def _with_room(like: torch.Tensor, length: int, held: torch.Tensor | None) -> torch.Tensor:
    """Room for [B, H, `length`, D], with `held` at its beginning."""
    room = like.new_empty((*like.shape[:-2], length, like.shape[-1]))
    if held is not None:
        room[..., : held.shape[-2], :] = held
    return room


class ModelDecoder:
    """A batch of B prompts, padded on the left, and the KV cache of what was decoded."""

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
        # A window that slides, or a state that is overwritten, has a layer of its own kind.
        self._cache.layers = [GrowingLayer() if type(one) is DynamicLayer else one for one in self._cache.layers]

    def prefill(self) -> torch.Tensor:
        """Logits [B, V] of each prompt's first answer token."""
        return self._forward(self._ids, self._positions)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append `tokens` [B]; logits [B, V] of the next."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=-1)
        self._positions = self._positions[:, -1:] + 1
        return self._forward(tokens[:, None], self._positions)

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all rows but those."""
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
