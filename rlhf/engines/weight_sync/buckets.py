"""How parameters are laid out for a transfer: in buckets of whole layers, each a flat buffer followed by its digest.

Pure functions: both sides derive the same layout from the parameters' names and shapes and the dtype that is sent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import xxhash

DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """Name and full shape of one parameter, as the Hugging Face model names it."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters that are sent together: parameter i begins at element `offsets[i]` of a flat buffer of `numel`."""

    parameters: tuple[ParameterSpec, ...]
    offsets: tuple[int, ...]
    numel: int

    @staticmethod
    def of(parameters: Sequence[ParameterSpec]) -> "Bucket":
        """Lay out `parameters` one after the other, without gaps: equal weights give equal bytes."""
        offsets, end = [], 0
        for parameter in parameters:
            offsets.append(end)
            end += parameter.numel
        return Bucket(tuple(parameters), tuple(offsets), end)

    def wire_bytes(self, dtype: torch.dtype) -> int:
        """Size in bytes of the flat buffer and its digest."""
        return self.numel * dtype.itemsize + DIGEST_BYTES

    def views(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters as views of the flat buffer [numel]."""
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            yield parameter.name, flat[offset : offset + parameter.numel].view(parameter.shape)


def layer_of(name: str) -> str | None:
    """The name up to its first number, which is the layer's index in every architecture; None outside the layers."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return None


def plan_buckets(specs: Sequence[ParameterSpec], dtype: torch.dtype, bucket_bytes: int) -> tuple[Bucket, ...]:
    """Split the parameters, in their order, into buckets of whole layers. A bucket has at most `bucket_bytes`, or a
    single layer that is larger. A parameter outside the layers (embedding, norm, head) counts as a layer of its own."""
    layers: list[list[ParameterSpec]] = []
    previous: str | None = None
    for spec in specs:
        layer = layer_of(spec.name)
        if layers and layer is not None and layer == previous:
            layers[-1].append(spec)
        else:
            layers.append([spec])
        previous = layer
    buckets: list[list[ParameterSpec]] = []
    size = 0
    for group in layers:
        group_bytes = sum(spec.numel for spec in group) * dtype.itemsize
        if buckets and size + group_bytes <= bucket_bytes:
            buckets[-1] += group
            size += group_bytes
        else:
            buckets.append(list(group))
            size = group_bytes
    return tuple(Bucket.of(bucket) for bucket in buckets)


def digest_bytes(buffer: torch.Tensor) -> bytes:
    """XXH3-128 of a contiguous uint8 CPU tensor: detects corruption, not an adversary; about as fast as memory."""
    return xxhash.xxh3_128_digest(buffer.numpy().data)


def append_digest(buffer: torch.Tensor) -> bytes:
    """Write the digest of a bucket's bytes into the last bytes of its buffer; returns the digest."""
    digest = digest_bytes(buffer[:-DIGEST_BYTES])
    buffer[-DIGEST_BYTES:] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    return digest


def verify_digest(buffer: torch.Tensor) -> tuple[bytes, bool]:
    """The digest of the bytes that arrived, and whether it equals the digest that was sent with them."""
    digest = digest_bytes(buffer[:-DIGEST_BYTES])
    return digest, digest == buffer[-DIGEST_BYTES:].numpy().tobytes()


def version_digest(dtype: torch.dtype, buckets: Sequence[Bucket], digests: Sequence[bytes]) -> str:
    """One digest of a whole version: of the dtype that was sent, every name and shape, and the buckets' digests."""
    whole = xxhash.xxh3_128(str(dtype).encode())
    for bucket, digest in zip(buckets, digests, strict=True):
        for spec in bucket.parameters:
            whole.update(f"{spec.name}{spec.shape}".encode())
        whole.update(digest)
    return whole.hexdigest()


def to_info(buckets: Sequence[Bucket]) -> list[list[tuple[str, list[int]]]]:
    """The layout as JSON values."""
    return [[(spec.name, list(spec.shape)) for spec in bucket.parameters] for bucket in buckets]


def from_info(info: Sequence[Sequence[tuple[str, Sequence[int]]]]) -> tuple[Bucket, ...]:
    """The layout that `to_info` described."""
    return tuple(Bucket.of([ParameterSpec(name, tuple(shape)) for name, shape in group]) for group in info)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype with this name."""
    return DTYPES[name]
