"""A digest that is computed on the tensors' own device, for weights that never pass through host memory.

A parameter's bytes, as 64-bit words x_i (the last one filled up with zeros), are summed with odd weights w_i:
sum_i x_i w_i mod 2^64. Changing one word always changes the sum (an odd weight is invertible); so does moving or
swapping words, unless the weights collide. Integer sums do not depend on the order in which a GPU adds.
"""

from collections.abc import Iterable, Iterator

import torch
import xxhash

WORD = 8
"""Bytes of a word."""
CHUNK = 1 << 24
"""Words that are summed at a time: 128 MiB."""
MULTIPLIER = -7046029254386353131  # 2^64 / golden ratio, odd, as int64: consecutive weights look unrelated


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """The weighted sum as an int64 scalar on the tensor's device; overflow wraps around."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    num_whole = data.numel() // WORD
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, num_whole, CHUNK):
        part = data[start * WORD : min(start + CHUNK, num_whole) * WORD]
        if part.storage_offset() % WORD:  # only whole words of the memory can be viewed as such
            part = part.clone()
        total += _weighted_sum(part.view(torch.int64), start)
    if len(rest := data[num_whole * WORD :]):
        last = torch.zeros(WORD, dtype=torch.uint8, device=tensor.device)
        last[: len(rest)] = rest
        total += _weighted_sum(last.view(torch.int64), num_whole)
    return total


def _weighted_sum(words: torch.Tensor, first: int) -> torch.Tensor:
    """The part of words [n], of which the first is word `first` of its tensor."""
    weights = torch.arange(first, first + len(words), dtype=torch.int64, device=words.device)
    return weights.mul_(MULTIPLIER).bitwise_or_(1).mul_(words).sum()  # in place: one array beside the words


class TensorDigest:
    """The digest of a stream of named tensors; their order does not matter."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def record(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass the tensors through and add them to the digest. Does not wait for the device."""
        for name, tensor in tensors:
            self._sums[name] = checksum(tensor)
            yield name, tensor

    def hexdigest(self) -> str:
        """The digest of every name and checksum recorded so far; waits for the device."""
        whole = xxhash.xxh3_128()
        if self._sums:
            values = torch.stack(list(self._sums.values())).tolist()
            for name, value in sorted(zip(self._sums, values, strict=True)):
                whole.update(f"{name}={value};".encode())
        return whole.hexdigest()
