"""Draws the tokens of all requests of a batch at once, where each request has a seed of its own."""

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

BLOCK = 512
DRAWN_OFFSETS = 4
"""How far vLLM turns a request's generator back when it discards a token that was drawn."""
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


Filter: TypeAlias = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]
"""(logits [B, V], k [B], p [B]) -> logits that are -inf outside top-k and top-p; None: all."""


class SeededGenerator(Protocol):
    """What a `torch.Generator` on a GPU is, as far as it is used here: a seed and a position."""

    def initial_seed(self) -> int: ...
    def get_offset(self) -> int: ...
    def set_offset(self, offset: int) -> object: ...


class SeededSampler(torch.nn.Module):
    """Takes the place of vLLM's top-k and top-p sampler on GPUs, where each request has a generator.

    vLLM's own draws a random number for each token of the vocabulary, with a kernel launch for each request. Here one
    token takes two numbers, a hash of its request's seed and position, and the launches are the same for any number of
    requests: the first number chooses a block of the vocabulary, the second one a token in it.
    """

    def __init__(self, keep: Filter) -> None:
        """`keep` is vLLM's filter by top-k and top-p."""
        super().__init__()
        self._keep = keep

    def forward(
        self,
        logits: torch.Tensor,
        generators: Mapping[int, SeededGenerator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, None]:
        """Tokens [B] for logits [B, V], which are changed in place. A row without a generator is one that vLLM does not
        sample (greedy); its token here means nothing."""
        probs = self._keep(logits, k, p).softmax(dim=-1, dtype=torch.float32)
        uniforms = torch.from_numpy(take_uniforms(generators, len(logits)))
        if logits.is_cuda:
            uniforms = uniforms.pin_memory()  # or the copy would wait for all kernels before it
        return draw(probs, uniforms.to(logits.device, non_blocking=True)), None


def draw(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Tokens [B] with probabilities `probs` [B, V], by two uniform numbers each, [2, B] in [0, 1).

    >>> draw(torch.tensor([[0.25, 0.0, 0.75]] * 3), torch.tensor([[0.5, 0.5, 0.5], [0.2, 0.3, 0.9]]).double())
    tensor([0, 2, 2])
    """
    blocks = torch.nn.functional.pad(probs, (0, -probs.shape[1] % BLOCK)).view(len(probs), -1, BLOCK)
    chosen = _choose(blocks.sum(dim=-1, dtype=torch.float64), uniforms[0])
    inside = blocks[torch.arange(len(blocks), device=blocks.device), chosen]
    tokens = chosen * BLOCK + _choose(inside.double(), uniforms[1])
    return tokens.clamp_(max=probs.shape[1] - 1)  # of probabilities that are not numbers: still a token


def _choose(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """[B, N] float64 weights, [B] uniform numbers -> [B] indices of weights above 0, by the inverse of the cumulative
    distribution."""
    cumulative = weights.cumsum(dim=-1)
    targets = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp_(max=weights.shape[1] - 1)


def take_uniforms(generators: Mapping[int, SeededGenerator], num_rows: int) -> npt.NDArray[np.float64]:
    """[2, num_rows] numbers in [0, 1 - 2**-48], by each generator's seed and position, which goes on."""
    places = np.zeros((2, num_rows), np.uint64)
    for row, generator in generators.items():
        offset = generator.get_offset()
        generator.set_offset(offset + DRAWN_OFFSETS)
        places[:, row] = generator.initial_seed() % 2**64, offset
    seeds, offsets = places
    keys = _mixed(seeds)
    numbers = np.stack([_mixed(keys + GOLDEN_RATIO * (offsets + np.uint64(number + 1))) for number in range(2)])
    return (numbers >> np.uint64(16)).astype(np.float64) * 2.0**-48


def _mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function (Steele et al. 2014): every bit of a result depends on every bit of the number."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))
