"""What the self-test feeds a model: two sequences of random tokens."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig

from rlhf.engines.models.packed import PackedInput

LENGTHS = (13, 9)
"""Few tokens, because what a short pass costs is reading the weights."""
SHARED = 4
"""Tokens that both sequences begin with: a causal model says the same of them in both."""


def random_sequences(config: PretrainedConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sequences without special tokens (padding and images are treated in their own ways). Always the same."""
    size = int(config.get_text_config().vocab_size)
    special = set(_special_tokens(config.to_dict()))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(size, (4 * sum(LENGTHS) + len(special),), generator=generator).tolist()
    tokens = torch.tensor([token for token in drawn if token not in special][: sum(LENGTHS)], device=device)
    first, second = tokens.split(LENGTHS)
    return first, torch.cat([first[:SHARED], second[SHARED:]])


def packed_input(sequences: tuple[torch.Tensor, ...], position_ids: torch.Tensor | None = None) -> PackedInput:
    """The sequences as one packed batch; with other positions than those that restart with each sequence."""
    lengths = [len(one) for one in sequences]
    token_ids = torch.cat(sequences)
    places = torch.cat([torch.arange(length, device=token_ids.device) for length in lengths])
    predicted = places.nonzero()[:, 0]
    return PackedInput(
        token_ids=token_ids,
        position_ids=places if position_ids is None else position_ids,
        predicted=predicted,
        wanted=predicted,
        last=torch.tensor(lengths, device=token_ids.device).cumsum(0) - 1,
        ending=torch.arange(len(lengths), device=token_ids.device),
        lengths=lengths,
        num_sequences=len(lengths),
        temperature=1.0,
    )


def context_length(config: PretrainedConfig) -> int | None:
    """The model's longest sequence, if its config says it."""
    longest = config.get_text_config().to_dict().get("max_position_embeddings")
    return longest if isinstance(longest, int) and longest > max(LENGTHS) else None


def _special_tokens(values: Mapping[str, Any]) -> Iterator[int]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _special_tokens(value)
        elif str(name).endswith(("_token_id", "_token_ids", "_token_index")):
            yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int))
