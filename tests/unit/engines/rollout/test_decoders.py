"""The KV cache of our own decoder holds what the library's holds."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from rlhf.engines.rollout.decoders import GrowingCacheLayer


@settings(max_examples=60, deadline=None)
@given(
    first=st.integers(1, 9),
    moves=st.lists(st.one_of(st.integers(1, 5), st.sampled_from(["drop", "turn"])), max_size=30),
)
def test_a_growing_cache_layer_equals_a_dynamic_one(first: int, moves: list[int | str]) -> None:
    """Whatever is appended, and whichever rows leave or change places on the way."""
    generator = torch.Generator().manual_seed(first)
    ours, theirs = GrowingCacheLayer(), DynamicLayer()
    rows = 4
    for move in (first, *moves):
        if isinstance(move, int):
            keys, values = torch.randn(2, rows, 3, move, 5, generator=generator)
            held = ours.update(keys, values)
            expected = theirs.update(keys, values)
            assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))
        else:
            kept = torch.arange(rows)[1:] if move == "drop" and rows > 1 else torch.arange(rows).flip(0)
            rows = len(kept)
            ours.batch_select_indices(kept)
            theirs.batch_select_indices(kept)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        pairs = ((ours.keys, theirs.keys), (ours.values, theirs.values))
        assert all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def test_the_buffer_doubles_and_is_not_reallocated_for_each_token() -> None:
    layer = GrowingCacheLayer()
    taken = set()
    for _ in range(100):
        keys, _values = layer.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
        taken.add(keys.data_ptr())
    assert len(taken) <= 8
