"""A packed batch on its device."""

from dataclasses import dataclass

import torch

from rlhf.types import PackedTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedInput:
    """A packed batch of T tokens in S sequences, on its device. The sequences are laid end to end without padding;
    `lengths` gives their sizes (whose running sum is `cu_seqlens`).

    `predicted` are the indices of the tokens that have a predecessor (all but each sequence's first), `wanted` those of
    them whose log-probs are needed, `last` [S] those of each sequence's last token. `temperature`: see `PackedTokens`.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    predicted: torch.Tensor
    wanted: torch.Tensor
    last: torch.Tensor
    lengths: list[int]
    temperature: float | None

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
            lengths=tokens.lengths.tolist(),
            temperature=tokens.temperature,
        )
