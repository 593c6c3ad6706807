"""A digest that is computed on the tensors' own device, for weights that never pass through host memory.

Each parameter's bit patterns x_i (as integers) are summed with odd weights w_i: sum_i x_i w_i mod 2^64. Changing one
element always changes the sum (an odd weight is invertible); so does moving or swapping elements, unless the weights
collide. Integer sums do not depend on the order in which a GPU adds.
"""

from collections.abc import Iterable, Iterator

import torch
import xxhash

CHUNK = 1 << 24
"""Elements that are converted to int64 at a time: 128 MiB."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MULTIPLIER = -7046029254386353131  # 2^64 / golden ratio, odd, as int64: consecutive weights look unrelated


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """The weighted sum as an int64 scalar on the tensor's device; overflow wraps around."""
    bits = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        index = torch.arange(start, start + part.numel(), dtype=torch.int64, device=tensor.device)
        total += (part * ((index * MULTIPLIER) | 1)).sum()
    return total


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
