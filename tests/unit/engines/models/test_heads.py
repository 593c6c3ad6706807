"""What a head says of tokens: at the temperature that answers are sampled at, or at another one that is asked for."""

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from rlhf.engines.models.attention import PACKED_SDPA  # noqa: F401  registers the kernel
from rlhf.engines.models.heads import PackedModel
from rlhf.engines.models.log_probs import LogitsRule
from rlhf.engines.models.packed import PackedInput
from rlhf.types import Head, PackedTokens
from tests.tiny_models import tiny_config

TOKENS = PackedTokens(token_ids=np.array([5, 9, 7, 3, 8], dtype=np.int64), lengths=np.array([3, 2], dtype=np.int64))


def said_by(temperature: float, asked: float | None) -> torch.Tensor:
    torch.manual_seed(0)
    model = PackedModel(
        LlamaForCausalLM(tiny_config()), Head.LOG_PROBS, LogitsRule(temperature=temperature, chunk_tokens=2)
    )
    tokens = PackedTokens(token_ids=TOKENS.token_ids, lengths=TOKENS.lengths, temperature=asked)
    said: torch.Tensor = model(PackedInput.from_numpy(tokens, torch.device("cpu")))
    return said


@pytest.mark.parametrize("sampled_at", [0.5, 1.0, 1.6])
def test_text_that_was_not_sampled_is_scored_at_the_given_temperature(sampled_at: float) -> None:
    assert torch.equal(said_by(sampled_at, asked=1.0), said_by(1.0, asked=None))
    if sampled_at != 1.0:
        assert not torch.allclose(said_by(sampled_at, asked=None), said_by(1.0, asked=None))
