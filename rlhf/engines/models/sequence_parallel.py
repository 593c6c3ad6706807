"""Ulysses sequence parallelism (Jacobs et al. 2023): the ranks of a group compute each packed batch together.

Each rank runs the layers over its own part of the tokens, so activations are divided by the size of the group. Before
attention an all-to-all gives every rank all tokens of some of the heads; after it another one undoes this. The output
layer, too, computes a rank's own tokens. Its outputs are one or two numbers a token: all ranks get all of them, and
take the same loss. The gradient of a rank is then the part of its own tokens, and the sum over the ranks is the
gradient of the batch, exactly as for ranks with batches of their own.

DeepSpeed's `UlyssesSPAttentionHF` does the same all-to-all, but for one model a process: it replaces a kernel in
transformers' registry and keeps its group in a module, where a policy and a reference may share a process; and it
changes modules that the self-test also runs without it.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.nn.functional import pad
from transformers import AttentionInterface, PreTrainedModel

from rlhf.engines.models.attention import FLASH, packed_sdpa
from rlhf.engines.models.packed import PackedInput
from rlhf.engines.models.passes import run_backbone

ULYSSES = "rlhf_ulysses"


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """The ranks that share sequences, as one of them sees it."""

    group: dist.ProcessGroup
    rank: int
    size: int


def join_sequence_group(size: int, device: torch.device) -> SequenceGroup | None:
    """This rank's group of `size` consecutive ranks; None for groups of one. Collective: all ranks call it."""
    if size == 1:
        return None
    world, rank = dist.get_world_size(), dist.get_rank()
    if world % size:
        raise ValueError(f"{world} ranks do not split into groups of {size}")
    timeout = dist.group.WORLD._get_backend(device).options._timeout  # type: ignore[union-attr]
    groups = [dist.new_group(list(range(i, i + size)), timeout=timeout) for i in range(0, world, size)]
    return SequenceGroup(group=groups[rank // size], rank=rank % size, size=size)


class _AllToAll(torch.autograd.Function):
    """[size, ...]: entry i goes to rank i, and becomes entry r of what rank i gets from rank r."""

    @staticmethod
    def forward(ctx: FunctionCtx, parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _AllToAll.apply(gradient, ctx.group), None  # type: ignore[no-untyped-call]


class _SumOfParts(torch.autograd.Function):
    """The sum over the group. Every rank takes the same loss of it, so a rank's part gets the gradient as it is."""

    @staticmethod
    def forward(ctx: FunctionCtx, part: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = part.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


@dataclass(frozen=True, slots=True)
class SplitBatch:
    """A packed batch that a group computes together: what attention needs to know of it."""

    group: SequenceGroup
    lengths: list[int]
    """Of all sequences, and of the padding behind them."""
    kernel: str
    """What computes attention once a rank has all tokens of its heads: flash_attention_2, or sdpa."""


def ulysses_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    split_batch: SplitBatch | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each of the packed sequences, of which this rank has n tokens.

    `query`, `key`, `value` [1, heads, n, d]. Returns [1, n, heads, d]. Raises NotImplementedError for what other ranks
    do not know: a mask of the rank's own tokens, caps on scores, sinks.
    """
    unknown = [name for name in ("softcap", "s_aux") if others.get(name) is not None]
    if split_batch is None or attention_mask is not None or unknown:
        why = " and ".join(unknown) or ("a mask of its own" if split_batch else "no arguments from its model")
        raise NotImplementedError(f"sequence_parallel_size above 1 knows no attention with {why}")
    size, group = split_batch.group.size, split_batch.group.group
    num_heads, num_tokens = query.shape[1:3]
    if num_heads % size:
        raise NotImplementedError(f"sequence_parallel_size {size} does not divide {num_heads} attention heads")
    copies = _copies(key.shape[1], num_heads, size)
    key, value = (x.repeat_interleave(copies, dim=1) if copies > 1 else x for x in (key, value))
    parts = [x[0].unflatten(0, (size, -1)).transpose(1, 2) for x in (query, key, value)]
    widths = [part[0, 0].numel() for part in parts]
    received = _AllToAll.apply(torch.cat([part.flatten(2) for part in parts], dim=-1), group)  # type: ignore[no-untyped-call]
    q, k, v = (
        x.flatten(0, 1).unflatten(-1, part.shape[2:]).transpose(0, 1)[None]
        for x, part in zip(received.split(widths, dim=-1), parts, strict=True)
    )
    kernel = flash_kernel if split_batch.kernel == FLASH else packed_sdpa
    lengths = split_batch.lengths
    attended, _ = kernel(
        module, q, k, v, None, sequence_lengths=lengths, scaling=scaling, sliding_window=sliding_window
    )
    back = _AllToAll.apply(attended[0].unflatten(0, (size, num_tokens)).flatten(2), group)  # type: ignore[no-untyped-call]
    return back.unflatten(-1, (num_heads // size, -1)).transpose(0, 1).flatten(1, 2)[None], None


def _copies(num_kv_heads: int, num_heads: int, size: int) -> int:
    """How often each key and value head is repeated, so that every rank gets those of its queries; the fewest."""
    per_kv_head = num_heads // num_kv_heads
    return next(n for n in range(1, per_kv_head + 1) if per_kv_head % n == 0 and num_kv_heads * n % size == 0)


def flash_kernel(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sequence_lengths: list[int],
    scaling: float | None = None,
    sliding_window: int | None = None,
) -> tuple[torch.Tensor, None]:
    """As `packed_sdpa`, by flash attention's kernel for sequences of different lengths."""
    from flash_attn import flash_attn_varlen_func  # noqa: PLC0415  only where a GPU has it

    ends = pad(torch.tensor(sequence_lengths, device=query.device).cumsum(0), (1, 0)).to(torch.int32)
    longest = max(sequence_lengths)
    window = (sliding_window - 1, 0) if sliding_window else (-1, -1)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    attended: torch.Tensor = flash_attn_varlen_func(
        q, k, v, ends, ends, longest, longest, softmax_scale=scaling, causal=True, window_size=window
    )
    return attended[None], None


AttentionInterface.register(ULYSSES, ulysses_attention)


@dataclass(frozen=True, slots=True)
class SplitPass:
    """One pass, in which each rank of a group computes its part of the tokens. The model's attention is `ULYSSES`."""

    group: SequenceGroup
    kernel: str

    @property
    def name(self) -> str:
        """See `SequencePasses.name`."""
        return f"packed, over {self.group.size} ranks"

    def outputs(self, model: PreTrainedModel, head: nn.Module, packed: PackedInput) -> torch.Tensor:
        """See `SequencePasses.outputs`: all outputs, on every rank of the group."""
        start, stop = self._range(len(packed.token_ids))
        hidden = self._own_rows(model, packed)[: stop - start]
        part: torch.Tensor = head(hidden, packed.of_rows(start, stop))
        total: torch.Tensor = _SumOfParts.apply(part, self.group.group)  # type: ignore[no-untyped-call]
        return total

    def order(self, lengths: list[int]) -> torch.Tensor:
        """See `SequencePasses.order`."""
        return torch.arange(*self._range(sum(lengths)))

    def _range(self, num_tokens: int) -> tuple[int, int]:
        """The first of this rank's tokens, and the end of them. The last ranks may have none."""
        num_rows = ceil(num_tokens / self.group.size)
        start = min(self.group.rank * num_rows, num_tokens)
        return start, min(start + num_rows, num_tokens)

    def _own_rows(self, model: PreTrainedModel, packed: PackedInput) -> torch.Tensor:
        """The last hidden states of this rank's tokens; behind the batch's last token those of padding, a sequence of
        its own, so that all ranks have equally many."""
        num_rows = ceil(len(packed.token_ids) / self.group.size)
        surplus = num_rows * self.group.size - len(packed.token_ids)
        padding = torch.arange(surplus, device=packed.position_ids.device)
        token_ids = torch.cat([packed.token_ids, packed.token_ids[:1].expand(surplus)])
        position_ids = torch.cat([packed.position_ids, padding])
        lengths = [*packed.lengths, surplus] if surplus else packed.lengths
        own = slice(self.group.rank * num_rows, (self.group.rank + 1) * num_rows)
        split_batch = SplitBatch(group=self.group, lengths=lengths, kernel=self.kernel)
        return run_backbone(model, token_ids[own], position_ids[own], lengths, split_batch=split_batch)
