"""The record of routed experts, by what an engine computes step by step. Experts are told from one another: token t of
a computation c has expert number 10 * c + t in each of its places."""

import numpy as np
import pytest

from rlhf.engines.rollout.routing_record import ComputedRows, RoutingRecord, of_tokens
from rlhf.errors import RlhfError

ROUTERS, TOP_K, BLOCK = 2, 3, 4
UNKNOWN = 255


def record(num_experts: int = 128) -> RoutingRecord:
    return RoutingRecord(num_blocks=8, block_size=BLOCK, num_routers=ROUTERS, top_k=TOP_K, num_experts=num_experts)


def rows(request: str, start: int, num: int, blocks: tuple[int, ...] = (5, 2, 7), prompt: int = 6) -> ComputedRows:
    return ComputedRows(request_id=request, start=start, num_rows=num, num_prompt_tokens=prompt, block_ids=blocks)


def experts(*numbers: int) -> np.ndarray:
    return np.repeat(np.array(numbers), ROUTERS * TOP_K).reshape(-1, ROUTERS, TOP_K)


def numbers(of: np.ndarray) -> list[int]:
    assert (of == of[:, :1, :1]).all()
    return [int(number) for number in of[:, 0, 0]]


def test_a_prompt_at_once_or_in_parts_and_then_token_by_token() -> None:
    kept = record()
    kept.add([rows("a", 0, 6)], experts(10, 11, 12, 13, 14, 15))
    kept.add([rows("b", 0, 2, (1,), prompt=3), rows("a", 6, 1)], experts(20, 21, 16))
    kept.add([rows("a", 7, 1), rows("b", 2, 1, (1,), prompt=3)], experts(17, 22))
    assert numbers(kept.take("a")) == [10, 11, 12, 13, 14, 15, 16, 17]
    assert numbers(kept.take("b")) == [20, 21, 22]


def test_a_cached_prefix_was_routed_when_it_was_computed() -> None:
    kept = record()
    kept.add([rows("a", 0, 6, (5, 2))], experts(10, 11, 12, 13, 14, 15))
    kept.forget(["a"])
    kept.add([rows("b", 4, 2, (5, 3))], experts(24, 25))
    assert numbers(kept.take("b")) == [10, 11, 12, 13, 24, 25]


def test_a_prefix_that_another_request_computes_in_the_same_step() -> None:
    kept = record()
    kept.add([rows("b", 4, 2, (5, 3)), rows("a", 0, 6, (5, 2))], experts(24, 25, 10, 11, 12, 13, 14, 15))
    assert numbers(kept.take("b")) == [10, 11, 12, 13, 24, 25]


def test_a_block_that_was_copied() -> None:
    kept = record()
    kept.add([rows("a", 0, 6, (5, 2))], experts(10, 11, 12, 13, 14, 15))
    kept.copy_blocks([(2, 6)])
    kept.add([rows("b", 6, 1, (5, 6))], experts(26))
    assert numbers(kept.take("b")) == [10, 11, 12, 13, 14, 15, 26]


def test_what_is_computed_again_keeps_its_first_experts() -> None:
    """After a preemption or with new weights: each log-prob came from the first pass."""
    kept = record()
    kept.add([rows("a", 0, 6)], experts(10, 11, 12, 13, 14, 15))
    kept.add([rows("a", 6, 1)], experts(16))
    kept.add([rows("a", 0, 8, (1, 3))], experts(20, 21, 22, 23, 24, 25, 26, 27))
    kept.add([rows("a", 8, 1, (1, 3, 4))], experts(28))
    assert numbers(kept.take("a")) == [10, 11, 12, 13, 14, 15, 16, 27, 28]
    kept.add([rows("b", 4, 2, (1, 6))], experts(34, 35))  # what the cache holds now are the newer ones
    assert numbers(kept.take("b")) == [20, 21, 22, 23, 34, 35]


def test_a_prompt_that_begins_again_before_a_token_was_sampled() -> None:
    kept = record()
    kept.add([rows("a", 0, 4)], experts(10, 11, 12, 13))
    kept.add([rows("a", 0, 6)], experts(20, 21, 22, 23, 24, 25))
    assert numbers(kept.take("a")) == [20, 21, 22, 23, 24, 25]


def test_a_prefix_that_nobody_computed_is_an_error() -> None:
    kept = record()
    kept.add([rows("a", 4, 2)], experts(14, 15))
    with pytest.raises(RlhfError, match="the engine found tokens in its prefix cache"):
        kept.take("a")


@pytest.mark.parametrize(("num_experts", "dtype"), [(255, np.uint8), (256, np.int16), (512, np.int16)])
def test_every_expert_differs_from_an_unknown_one(num_experts: int, dtype: type) -> None:
    kept = record(num_experts)
    kept.add([rows("a", 0, 1, prompt=1)], experts(num_experts - 1))
    found = kept.take("a")
    assert found.dtype == dtype
    assert numbers(found) == [num_experts - 1]


@pytest.mark.parametrize("extra", [(), (15,), (15, 16)])
def test_experts_of_the_last_token_are_unknown(extra: tuple[int, ...]) -> None:
    """An engine may have computed tokens beyond the end before it knew of it."""
    found = of_tokens(experts(10, 11, 12, 13, 14, *extra).astype(np.uint8), 6)
    assert numbers(found) == [10, 11, 12, 13, 14, UNKNOWN]


def test_too_few_are_an_error() -> None:
    with pytest.raises(RlhfError, match="experts of 4 tokens recorded, of 6 sampled"):
        of_tokens(experts(10, 11, 12, 13).astype(np.uint8), 6)
