"""Which experts a rollout engine used for each token of its requests, by the blocks of its KV cache.

An engine with a prefix cache routes a token of a shared prompt once. Later requests find its keys and values in a
block, and the experts that these were computed with here, under the same block. A token is recorded when a request
first computes or finds it. Where its keys and values are computed again, after a preemption or with new weights, the
record stays: the log-prob of the token after it came from the first pass.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf.errors import RlhfError
from rlhf.types import ExpertArray


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputedRows:
    """What one step computed of a request: `num_rows` tokens from token `start` on. `block_ids` are the blocks that
    hold its tokens, in their order."""

    request_id: str
    start: int
    num_rows: int
    num_prompt_tokens: int
    block_ids: Sequence[int]


@dataclass(slots=True)
class _Recorded:
    """The experts of a request's first `num_tokens` tokens."""

    parts: list[ExpertArray] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, rows: ExpertArray) -> None:
        self.parts.append(rows)
        self.num_tokens += len(rows)

    def cut(self, num_tokens: int) -> None:
        self.parts = [np.concatenate(self.parts)[:num_tokens]]
        self.num_tokens = num_tokens


class RoutingRecord:
    """The record of one engine. Used by one thread."""

    def __init__(self, *, num_blocks: int, block_size: int, num_routers: int, top_k: int, num_experts: int) -> None:
        """`block_size` is in tokens."""
        dtype: type[np.integer[Any]] = np.uint8 if num_experts <= np.iinfo(np.uint8).max else np.int16
        self._block_size = block_size
        self._unknown = np.iinfo(dtype).max
        self._slots: ExpertArray = np.full((num_blocks * block_size, num_routers, top_k), self._unknown, dtype=dtype)
        self._requests: dict[str, _Recorded] = {}

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Follow the engine, which copied the first block of each pair into the second."""
        blocks = self._slots.reshape(-1, self._block_size, *self._slots.shape[1:])
        for source, copied in pairs:
            blocks[copied] = blocks[source]

    def add(self, computed: Sequence[ComputedRows], experts: np.ndarray) -> None:
        """Record a step. `experts` [tokens, routers, top_k] are of the rows of all requests, in their order."""
        ends = np.cumsum([one.num_rows for one in computed])
        parts = np.split(experts.astype(self._slots.dtype), ends[:-1])
        # First all of them: a request may find what another one computes in the same step.
        for one, rows in zip(computed, parts, strict=True):
            self._slots[self._places(one, one.start, one.start + one.num_rows)] = rows
        for one in computed:
            recorded = self._requests.setdefault(one.request_id, _Recorded())
            if one.start < recorded.num_tokens < one.num_prompt_tokens:
                recorded.cut(one.start)  # its prompt begins again before a token was sampled
            end = one.start + one.num_rows
            if end > recorded.num_tokens:
                recorded.add(self._slots[self._places(one, recorded.num_tokens, end)])

    def take(self, request_id: str) -> ExpertArray:
        """The experts of a request whose last token was sampled: of its tokens but the last one, which was not
        computed, or of more. Raises RlhfError if one is unknown."""
        experts = np.concatenate(self._requests.pop(request_id).parts)
        if (experts == self._unknown).any():
            raise RlhfError("rollout.router_replay: the engine found tokens in its prefix cache that it never computed")
        return experts

    def forget(self, request_ids: Collection[str]) -> None:
        """Drop what is recorded of requests that have ended."""
        for request_id in request_ids:
            self._requests.pop(request_id, None)

    def _places(self, computed: ComputedRows, start: int, end: int) -> np.ndarray:
        """The slots of tokens start to end - 1."""
        positions = np.arange(start, end)
        blocks = np.asarray(computed.block_ids)[positions // self._block_size]
        places: np.ndarray = blocks * self._block_size + positions % self._block_size
        return places


def of_tokens(experts: ExpertArray, num_tokens: int) -> ExpertArray:
    """[num_tokens, routers, top_k] from what `take` gave: those of the last token are unknown."""
    unknown = np.full((1, *experts.shape[1:]), np.iinfo(experts.dtype).max, dtype=experts.dtype)
    if len(experts) < num_tokens - 1:
        raise RlhfError(f"rollout.router_replay: experts of {len(experts)} tokens recorded, of {num_tokens} sampled")
    return np.concatenate([experts[: num_tokens - 1], unknown])
