"""How parameters are laid out for the wire: in buckets of whole layers, each one flat buffer with its digest behind it.

Pure: both sides derive the same layout from the names, shapes and the one dtype of the wire.
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
    """Parameters that travel together: parameter i lies at element `offsets[i]` of a flat buffer of `numel`."""

    parameters: tuple[ParameterSpec, ...]
    offsets: tuple[int, ...]
    numel: int

    @staticmethod
    def of(parameters: Sequence[ParameterSpec]) -> "Bucket":
        """Lay `parameters` out one after the other, without gaps: equal weights have equal bytes."""
        offsets, end = [], 0
        for parameter in parameters:
            offsets.append(end)
            end += parameter.numel
        return Bucket(tuple(parameters), tuple(offsets), end)

    def wire_bytes(self, dtype: torch.dtype) -> int:
        """Size of the flat buffer with the digest behind it."""
        return self.numel * dtype.itemsize + DIGEST_BYTES

    def views(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters as views of the flat buffer [numel]."""
        for parameter, offset in zip(self.parameters, self.offsets, strict=True):
            yield parameter.name, flat[offset : offset + parameter.numel].view(parameter.shape)


def layer_of(name: str) -> str | None:
    """The name up to its first number, which counts layers in every architecture; None outside the layers."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return None


def plan_buckets(specs: Sequence[ParameterSpec], dtype: torch.dtype, bucket_bytes: int) -> tuple[Bucket, ...]:
    """Cut the parameters, in their order, into buckets of whole layers with at least one layer and, where a layer is
    smaller, at most `bucket_bytes`. What lies outside the layers (embeddings, norms, heads) is a layer by itself."""
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
    """XXH3-128 of a contiguous uint8 tensor on the CPU: catches corruption, not an adversary; about memory speed."""
    return xxhash.xxh3_128_digest(buffer.numpy().data)


def seal(buffer: torch.Tensor) -> bytes:
    """Write the digest of a bucket's bytes behind them; returns it."""
    digest = digest_bytes(buffer[:-DIGEST_BYTES])
    buffer[-DIGEST_BYTES:] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    return digest


def is_sealed(buffer: torch.Tensor) -> tuple[bytes, bool]:
    """The digest of the bytes that arrived, and whether it equals the one that came with them."""
    digest = digest_bytes(buffer[:-DIGEST_BYTES])
    return digest, digest == buffer[-DIGEST_BYTES:].numpy().tobytes()


def whole_digest(dtype: torch.dtype, buckets: Sequence[Bucket], digests: Sequence[bytes]) -> str:
    """One digest of a whole version: of the wire's dtype, every name and shape, and the buckets' digests in order."""
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
    """The torch dtype of a config's name."""
    return DTYPES[name]
