"""How the sequences of a pack go through the backbone without seeing each other.

Which way is right depends on the model and its kernels: the self-test (`self_test.py`) chooses.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.engines.models.attention import PACKED_SDPA
from rlhf.engines.models.own_logits import backbone
from rlhf.engines.models.packed import PackedInput
from rlhf.engines.models.rope_state import forget_longest_sequence

MostOnAnyRank = Callable[[int], int]
"""The maximum of a number over the ranks that must run equally many passes, asked before the first. ZeRO-3 gathers each
layer in every pass, on all ranks; then it is an all-reduce."""


class SequencePasses(Protocol):
    """Runs S sequences, T tokens laid end to end, through a model's backbone and a head."""

    @property
    def name(self) -> str:
        """What a user reads."""
        ...

    def outputs(self, model: PreTrainedModel, head: nn.Module, packed: PackedInput) -> torch.Tensor:
        """What the head says of the whole batch (see `heads.py`)."""
        ...

    def order(self, lengths: list[int]) -> torch.Tensor:
        """The tokens of this rank in the order in which layers see them, pass by pass. Those of idle passes, and
        padding, come after them."""
        ...


class OwnPasses(ABC):
    """Passes in which a rank computes all tokens of its batch."""

    @abstractmethod
    def hidden(
        self, model: PreTrainedModel, token_ids: torch.Tensor, position_ids: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        """`token_ids` and `position_ids` [T], which restart with each sequence -> the last hidden states [T, d]."""

    def outputs(self, model: PreTrainedModel, head: nn.Module, packed: PackedInput) -> torch.Tensor:
        """See `SequencePasses.outputs`."""
        hidden = self.hidden(model, packed.token_ids, packed.position_ids, packed.lengths)
        outputs: torch.Tensor = head(hidden, packed)
        return outputs

    @abstractmethod
    def order(self, lengths: list[int]) -> torch.Tensor:
        """[T]: see `SequencePasses.order`."""


class PackedPass(OwnPasses):
    """One pass; position ids that restart tell attention where sequences begin."""

    name = "packed"

    def hidden(
        self, model: PreTrainedModel, token_ids: torch.Tensor, position_ids: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        """See `OwnPasses.hidden`."""
        return run_backbone(model, token_ids, position_ids, lengths)

    def order(self, lengths: list[int]) -> torch.Tensor:
        """See `SequencePasses.order`."""
        return torch.arange(sum(lengths))


class BoundariesPass(OwnPasses):
    """One pass; the model's kernels get the boundaries of sequences (variable-length attention, and convolutions and
    scans that restart)."""

    name = "packed, with boundaries for the model's kernels"

    def hidden(
        self, model: PreTrainedModel, token_ids: torch.Tensor, position_ids: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        """See `OwnPasses.hidden`."""
        sizes = torch.tensor(lengths, device=token_ids.device)
        ends = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).to(torch.int32)
        index = torch.arange(len(lengths), device=token_ids.device, dtype=torch.int32).repeat_interleave(sizes)
        return run_backbone(
            model,
            token_ids,
            position_ids,
            lengths,
            cu_seq_lens_q=ends,
            cu_seq_lens_k=ends,
            max_length_q=max(lengths),
            max_length_k=max(lengths),
            seq_idx=index[None],
        )

    def order(self, lengths: list[int]) -> torch.Tensor:
        """See `SequencePasses.order`."""
        return torch.arange(sum(lengths))


class SinglePasses(OwnPasses):
    """One pass for each sequence: right for every causal model."""

    name = "one sequence a forward pass"

    def __init__(self, most_on_any_rank: MostOnAnyRank) -> None:
        self._most_on_any_rank = most_on_any_rank

    def hidden(
        self, model: PreTrainedModel, token_ids: torch.Tensor, position_ids: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        """See `OwnPasses.hidden`."""
        num_passes = self._most_on_any_rank(len(lengths))
        parts = zip(token_ids.split(lengths), position_ids.split(lengths), strict=True)
        outputs = [_alone(model, *part) for part in parts]
        return torch.cat(_with_idle_passes(outputs, num_passes, model, token_ids))

    def order(self, lengths: list[int]) -> torch.Tensor:
        """See `SequencePasses.order`."""
        return torch.arange(sum(lengths))


@dataclass(frozen=True, slots=True)
class ByLength(OwnPasses):
    """Sequences of at most `limit` tokens by other passes; each longer one alone, because rotary embeddings scale with
    the longest sequence of a pass beyond it."""

    short: PackedPass | BoundariesPass
    limit: int
    most_on_any_rank: MostOnAnyRank

    @property
    def name(self) -> str:
        """See `SequencePasses.name`."""
        return f"{self.short.name}; sequences over {self.limit} tokens alone"

    def hidden(
        self, model: PreTrainedModel, token_ids: torch.Tensor, position_ids: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        """See `OwnPasses.hidden`."""
        fitting, longer = self._places(lengths, token_ids.device)
        num_passes = self.most_on_any_rank(bool(fitting) + len(longer))
        outputs = []
        if fitting:
            chosen = torch.cat(fitting)
            forget_longest_sequence(model)
            outputs.append(
                self.short.hidden(model, token_ids[chosen], position_ids[chosen], [len(place) for place in fitting])
            )
        outputs += [_alone(model, token_ids[place], position_ids[place]) for place in longer]
        order = torch.cat([*fitting, *longer]).argsort()
        return torch.cat(_with_idle_passes(outputs, num_passes, model, token_ids))[order]

    def order(self, lengths: list[int]) -> torch.Tensor:
        """See `SequencePasses.order`."""
        fitting, longer = self._places(lengths, torch.device("cpu"))
        return torch.cat([*fitting, *longer])

    def _places(self, lengths: list[int], device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The tokens of each sequence that fits, and of each longer one."""
        places = torch.arange(sum(lengths), device=device).split(lengths)
        fitting = [place for place in places if len(place) <= self.limit]
        return fitting, [place for place in places if len(place) > self.limit]


def own_pace(num_passes: int) -> int:
    """For ranks that need not run equally many passes."""
    return num_passes


def _with_idle_passes(
    outputs: list[torch.Tensor], num_passes: int, model: PreTrainedModel, token_ids: torch.Tensor
) -> list[torch.Tensor]:
    """Run passes over one token until there are `num_passes`. They are in the graph with a weight of 0, so that
    backward passes are equally many, too."""
    first, *others = outputs
    for _ in range(num_passes - len(outputs)):
        first = first + 0.0 * _alone(model, token_ids[:1], torch.zeros_like(token_ids[:1])).sum()
    return [first, *others]


def _alone(model: PreTrainedModel, token_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    forget_longest_sequence(model)
    return run_backbone(model, token_ids, position_ids, [len(token_ids)])


def run_backbone(
    model: PreTrainedModel, token_ids: torch.Tensor, position_ids: torch.Tensor, lengths: list[int], **kernel: object
) -> torch.Tensor:
    """One pass over `token_ids` [T] -> the last hidden states [T, d]; `kernel` is what attention and layers get."""
    if model.config._attn_implementation == PACKED_SDPA:
        kernel["sequence_lengths"] = lengths
    _, below = backbone(model)
    outputs = below(
        input_ids=token_ids[None], position_ids=position_ids[None], attention_mask=None, use_cache=False, **kernel
    )
    hidden: torch.Tensor = outputs.last_hidden_state[0]
    return hidden
