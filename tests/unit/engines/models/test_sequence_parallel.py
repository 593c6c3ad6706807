"""The parts of sequence parallelism that need no second process: heads on a part of the tokens, windows, heads that are
shared out. Whole models on several ranks are in tests/integration/test_sequence_parallel.py."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from rlhf.engines.models.attention import packed_sdpa
from rlhf.engines.models.heads import LogProbHead, ScoreHead, TokenScoreHead, ValueHead
from rlhf.engines.models.log_probs import LogitsRule
from rlhf.engines.models.packed import PackedInput
from rlhf.engines.models.sequence_parallel import _copies, ulysses_attention
from rlhf.types import PackedTokens

LENGTHS = (5, 1, 7, 4)
WIDTH, VOCABULARY = 6, 11


def packed() -> PackedInput:
    rng = np.random.default_rng(0)
    tokens = PackedTokens(
        token_ids=rng.integers(0, VOCABULARY, sum(LENGTHS)),
        lengths=np.array(LENGTHS),
        wanted=rng.random(sum(LENGTHS)) < 0.6,
    )
    return PackedInput.from_numpy(tokens, torch.device("cpu"))


def heads() -> list[nn.Module]:
    torch.manual_seed(0)
    score = nn.Linear(WIDTH, 1)
    return [
        LogProbHead(nn.Linear(WIDTH, VOCABULARY), LogitsRule(chunk_tokens=2)),
        ValueHead(score),
        ScoreHead(score),
        TokenScoreHead(score.weight, score.bias),
    ]


@pytest.mark.parametrize("head", heads(), ids=lambda head: type(head).__name__)
@pytest.mark.parametrize("size", [2, 3, 4, 17, 20])
def test_what_a_head_says_of_parts_adds_up_to_what_it_says_of_the_batch(head: nn.Module, size: int) -> None:
    whole, num_tokens = packed(), sum(LENGTHS)
    hidden = torch.randn(num_tokens, WIDTH)
    rows = -(-num_tokens // size)
    parts = []
    for start in range(0, size * rows, rows):
        first, stop = min(start, num_tokens), min(start + rows, num_tokens)
        parts.append(head(hidden[first:stop], whole.of_rows(first, stop)))
    torch.testing.assert_close(torch.stack(parts).sum(0), head(hidden, whole))


@pytest.mark.parametrize(
    ("num_kv_heads", "num_heads", "size", "copies"),
    [(8, 8, 4, 1), (2, 8, 2, 1), (2, 8, 4, 2), (1, 8, 8, 8), (4, 16, 8, 2), (3, 12, 2, 2), (3, 6, 2, 2), (6, 12, 4, 2)],
)
def test_every_rank_gets_the_keys_of_its_queries(num_kv_heads: int, num_heads: int, size: int, copies: int) -> None:
    assert _copies(num_kv_heads, num_heads, size) == copies
    of_queries = np.repeat(np.arange(num_kv_heads), num_heads // num_kv_heads).reshape(size, -1)
    of_keys = np.repeat(np.arange(num_kv_heads), copies).reshape(size, -1)
    groups = of_queries.shape[1] // of_keys.shape[1]
    assert np.array_equal(np.repeat(of_keys, groups, axis=1), of_queries)


@pytest.mark.parametrize("window", [1, 2, 3, 6, 7, 8, None])
def test_a_window_hides_what_is_older(window: int | None) -> None:
    torch.manual_seed(1)
    query, key, value = (torch.randn(1, heads, sum(LENGTHS), 4) for heads in (4, 2, 2))
    found, _ = packed_sdpa(
        nn.Module(), query, key, value, None, sequence_lengths=list(LENGTHS), scaling=0.3, sliding_window=window
    )
    sequence = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    ages = np.arange(sum(LENGTHS))[:, None] - np.arange(sum(LENGTHS))
    seen = (sequence[:, None] == sequence) & (ages >= 0) & (ages < (window or sum(LENGTHS)))
    keys, values = (x.repeat_interleave(2, dim=1) for x in (key, value))
    expected = scaled_dot_product_attention(query, keys, values, attn_mask=torch.tensor(seen), scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_attention_that_other_ranks_do_not_know_is_refused() -> None:
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(
        NotImplementedError, match=r"sequence_parallel_size above 1 knows no attention with no arguments"
    ):
        ulysses_attention(nn.Module(), x, x, x, None)
