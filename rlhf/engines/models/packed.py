"""A packed batch on its device."""

from dataclasses import dataclass, replace

import torch

from rlhf.types import PackedTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedInput:
    """A packed batch of T tokens in S sequences, on its device. The sequences are laid end to end without padding;
    `lengths` gives the sizes of the contexts that they are made of, mostly one each (the running sum is `cu_seqlens`).

    `predicted` are the indices of the tokens that have a predecessor (all but each context's first), `wanted` those of
    them whose log-probs are needed, `last` [S] those of each sequence's last token, `ending` [S] those of the sequences
    themselves. `temperature` and `routed_experts`: see `PackedTokens`. `start` is the token of a head's first hidden
    state.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    predicted: torch.Tensor
    wanted: torch.Tensor
    last: torch.Tensor
    ending: torch.Tensor
    lengths: list[int]
    num_sequences: int
    temperature: float | None
    routed_experts: torch.Tensor | None = None
    start: int = 0

    @classmethod
    def from_numpy(cls, tokens: PackedTokens, device: torch.device) -> "PackedInput":
        """Copy a packed batch to `device`."""
        positions = tokens.position_ids
        predicted = positions > 0
        wanted = predicted if tokens.wanted is None else predicted & tokens.wanted
        return cls(
            token_ids=torch.tensor(tokens.token_ids, device=device),
            position_ids=torch.tensor(positions, device=device),
            predicted=torch.tensor(predicted.nonzero()[0], device=device),
            wanted=torch.tensor(wanted.nonzero()[0], device=device),
            last=torch.tensor(tokens.lengths.cumsum() - 1, device=device),
            ending=torch.arange(len(tokens.lengths), device=device),
            lengths=tokens.context_lengths.tolist(),
            num_sequences=len(tokens.lengths),
            temperature=tokens.temperature,
            routed_experts=None
            if tokens.routed_experts is None
            else torch.tensor(tokens.routed_experts, device=device),
        )

    def of_rows(self, start: int, stop: int) -> "PackedInput":
        """The same batch for a head that gets the hidden states of tokens start to stop - 1 only: `predicted` and
        `wanted` are the tokens that these predict, `last` and `ending` are of the sequences that end there."""
        ends_here = (self.last >= start) & (self.last < stop)
        return replace(
            self,
            predicted=self.predicted[(self.predicted > start) & (self.predicted <= stop)],
            wanted=self.wanted[(self.wanted > start) & (self.wanted <= stop)],
            last=self.last[ends_here],
            ending=self.ending[ends_here],
            start=start,
        )
