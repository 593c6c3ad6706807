"""Drawing for many seeded requests at once: the distribution, the seeds, and the launches."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.engines.rollout.seeded_sampler import BLOCK, DRAWN_OFFSETS, SeededSampler, draw, take_uniforms


class OffsetGenerator:
    """What is used of a generator on a GPU."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.offset = 0

    def initial_seed(self) -> int:
        return self._seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        self.offset = offset


def keep_all(logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None) -> torch.Tensor:
    del k, p
    return logits


def tokens(sampler: SeededSampler, logits: torch.Tensor, *generators: OffsetGenerator) -> list[int]:
    drawn, _ = sampler(logits.clone(), dict(enumerate(generators)), None, None)
    return [int(token) for token in drawn]


@pytest.mark.parametrize("size", [5, BLOCK, 3 * BLOCK + 7])
def test_tokens_have_their_probabilities(size: int) -> None:
    probs = torch.randn(size, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    probs[::3] = 0.0
    probs /= probs.sum()
    num_draws = 40_000
    uniforms = take_uniforms({row: OffsetGenerator(row) for row in range(num_draws)}, num_draws)
    drawn = torch.cat(
        [draw(probs.expand(len(part.T), -1), part) for part in torch.from_numpy(uniforms).split(4000, dim=1)]
    )
    counts = torch.bincount(drawn, minlength=size)
    assert len(counts) == size
    assert not counts[::3].any()
    sigma = (num_draws * probs * (1 - probs)).sqrt().clamp(min=1.0)
    assert ((counts - num_draws * probs).abs() / sigma).max() < 5


def test_numbers_are_uniform_and_independent_of_each_other() -> None:
    generators = {row: OffsetGenerator(row) for row in range(500)}
    numbers = np.stack([take_uniforms(generators, 500) for _ in range(40)])  # [positions, 2, seeds]
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert np.abs(np.histogram(numbers, bins=50, range=(0, 1))[0] / 800 - 1).max() < 0.2
    for one, other in (
        (numbers[:, 0], numbers[:, 1]),
        (numbers[:-1], numbers[1:]),
        (numbers[..., :-1], numbers[..., 1:]),
    ):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.03


def test_only_seed_and_position_decide() -> None:
    sampler = SeededSampler(keep_all)
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(1))
    alone = OffsetGenerator(7)
    expected = [tokens(sampler, logits, alone)[0] for _ in range(20)]
    assert len(set(expected)) > 10
    again, other = OffsetGenerator(7), OffsetGenerator(8)
    together = [tokens(sampler, logits.expand(2, -1), other, again)[1] for _ in range(20)]
    assert together == expected
    # vLLM turns the generator back where it discards a token, as after a chunk of a prompt.
    again.set_offset(again.get_offset() - DRAWN_OFFSETS)
    assert tokens(sampler, logits, again) == expected[-1:]


def test_a_row_without_a_seed_and_numbers_that_are_none_do_no_harm() -> None:
    sampler = SeededSampler(keep_all)
    logits = torch.tensor([[0.0, 1.0, 2.0], [float("nan")] * 3])
    drawn, log_probs = sampler(logits, {1: OffsetGenerator(3)}, None, None)
    assert log_probs is None
    assert all(0 <= int(token) < 3 for token in drawn)


def test_the_last_number_draws_a_token_that_has_a_probability() -> None:
    largest = torch.full((2, 1), 1 - 2.0**-48, dtype=torch.float64)
    assert draw(torch.tensor([[0.5, 0.5, 0.0]]), largest).tolist() == [1]


class CountCalls(TorchDispatchMode):
    """Counts the operations of torch while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        del types
        self.num_calls += 1
        return func(*args, **(kwargs or {}))


def test_more_requests_launch_no_more_kernels() -> None:
    sampler = SeededSampler(keep_all)
    calls = []
    for rows in (2, 64):
        logits, generators = torch.zeros(rows, 50), {row: OffsetGenerator(row) for row in range(rows)}
        with CountCalls() as counted:
            sampler(logits, generators, None, None)
        calls.append(counted.num_calls)
    assert calls[0] == calls[1] < 30
