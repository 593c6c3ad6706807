"""Memory that ran out is named with phase, role, sizes and the setting that helps; nothing else is."""

import pickle

import numpy as np
import pytest
import torch

from rlhf.engines.process.memory_errors import ADVICE, is_out_of_memory, naming_memory_errors
from rlhf.errors import MemoryExhaustedError, StallError
from rlhf.types import PackedTokens

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is "
    "free. Of the allocated memory 70 GiB is allocated by PyTorch."
)


def packed(*lengths: int) -> PackedTokens:
    return PackedTokens(token_ids=np.zeros(sum(lengths), dtype=np.int64), lengths=np.array(lengths))


def caught(error: Exception, role: str, phase: str, *batches: PackedTokens) -> BaseException:
    with pytest.raises(Exception) as raised, naming_memory_errors(role, phase, batches):  # noqa: PT011
        raise error
    return raised.value


def test_it_names_everything_and_survives_the_way_to_the_driver() -> None:
    error = caught(torch.OutOfMemoryError(CUDA), "policy", "forward_backward", packed(3, 5), packed(6))
    assert isinstance(error, MemoryExhaustedError)
    assert str(error) == (
        "policy forward_backward: out of memory with micro-batches of up to 8 tokens, the longest sequence 6: "
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is "
        "free. Lower train.max_tokens_per_micro_batch, or set policy.gradient_checkpointing or "
        "policy.mlp_chunk_tokens, or lower policy.log_probs_chunk_tokens."
    )
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.splittable_tokens) == (str(error), 8)


def test_a_single_sequence_cannot_be_split() -> None:
    error = caught(MemoryError(), "reward", "forward", packed(9), packed(2, 3))
    assert isinstance(error, MemoryExhaustedError)
    assert error.splittable_tokens == 0
    assert str(error).endswith(" reward.sequence_parallel_size lets several processes share a sequence.")


@pytest.mark.parametrize("phase", ADVICE)
def test_every_phase_names_a_setting(phase: str) -> None:
    error = caught(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "critic", phase)
    assert isinstance(error, MemoryExhaustedError)
    assert any(f"{section}." in str(error) for section in ("train", "critic", "rollout"))
    assert "{" not in str(error)


def test_real_memory_that_runs_out_is_seen() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)
    wrapped = ValueError("engine core failed")
    wrapped.__cause__ = raised.value
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("out of memory"), StallError("x")])
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    assert caught(error, "policy", "forward") is error
