"""Where the weights of a sync come from: what a sender asks of a model.

A source gives one bucket at a time, in the dtype that is sent; the whole model is never materialized. Tied weights are
given once, under the name that `named_parameters` gives them.
"""

from collections.abc import Iterator
from typing import Protocol

import torch

from rlhf.engines.weight_sync.buckets import Bucket, ParameterSpec


class Gather(Protocol):
    """A bucket on its way to rank 0."""

    def wait(self, timeout_s: float) -> None:
        """Block until rank 0 has the whole bucket (on other ranks: until their part is sent). Raises WeightSyncError
        after `timeout_s`."""
        ...


class WeightSource(Protocol):
    """Gives a model's weights bucket by bucket. All trainer ranks go through the same buckets in the same order."""

    dtype: torch.dtype
    """The dtype that is sent: the one that the rollout engines compute in."""
    device: torch.device
    """Device of the buffer that `gather` fills, and of the tensors that `materialize` gives."""

    def specs(self) -> list[ParameterSpec]:
        """Name and full shape of every parameter, without communication."""
        ...

    def gather(self, bucket: Bucket, flat: torch.Tensor | None) -> Gather:
        """Start to fill `flat` [bucket.numel] on rank 0; the other ranks pass None and send their shards."""
        ...

    def materialize(self, bucket: Bucket) -> Iterator[tuple[str, torch.Tensor]]:
        """Give the bucket's full tensors on every rank. Collective."""
        ...


class Done:
    """A gather that needs no communication."""

    def wait(self, timeout_s: float) -> None:
        del timeout_s
