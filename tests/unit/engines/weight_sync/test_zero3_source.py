"""Shards of all ranks arrive in one bucket, without padding. The ranks take turns in this process: a rank's messages
wait in a list until rank 0 receives them."""

from dataclasses import dataclass, field
from math import ceil
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf.engines.weight_sync import zero3_source
from rlhf.engines.weight_sync.buckets import Bucket, ParameterSpec
from rlhf.engines.weight_sync.zero3_source import Zero3Source
from rlhf.errors import WeightSyncError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # importing DeepSpeed warns

NUM_RANKS = 3
WEIGHTS = {"layers.0.weight": torch.arange(10.0).view(2, 5), "layers.0.bias": torch.arange(20.0, 22.0)}
SPECS = [ParameterSpec("layers.0.weight", (2, 5)), ParameterSpec("layers.0.bias", (2,))]


@dataclass
class Wire:
    """torch.distributed for the rank whose turn it is."""

    rank: int = 0
    sent: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    waited: list[float] = field(default_factory=list)
    broken: bool = False

    isend = "send"
    irecv = "receive"

    def get_world_size(self) -> int:
        return NUM_RANKS

    def get_rank(self) -> int:
        return self.rank

    def get_backend(self) -> str:
        return "gloo"

    def P2POp(self, kind: str, tensor: torch.Tensor, peer: int) -> tuple[str, torch.Tensor, int]:  # noqa: N802
        return kind, tensor, peer

    def batch_isend_irecv(self, operations: list[tuple[str, torch.Tensor, int]]) -> list[Any]:
        assert operations, "an empty batch is an error"
        for kind, tensor, peer in operations:
            if kind == "send":
                assert peer == 0
                self.sent.setdefault(self.rank, []).append(tensor.clone())
            else:
                tensor.copy_(self.sent[peer].pop(0))
        return [SimpleNamespace(wait=self._wait)]

    def _wait(self, timeout: Any) -> None:
        self.waited.append(timeout.total_seconds())
        if self.broken:
            raise RuntimeError("connection closed")


class Module(torch.nn.Module):
    """A rank's shards, as ZeRO-3 leaves them: of equal length, the last one padded."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(5, 2)])
        for name, parameter in self.named_parameters():
            whole = WEIGHTS[name].flatten()
            size = ceil(len(whole) / NUM_RANKS)
            shard = torch.full((size,), torch.nan)
            held = whole[rank * size : (rank + 1) * size]
            shard[: len(held)] = held
            parameter.data = torch.empty(0)
            parameter.ds_shape, parameter.ds_numel = WEIGHTS[name].shape, len(whole)  # type: ignore[attr-defined]
            parameter.ds_tensor = shard  # type: ignore[attr-defined]


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    found = Wire()
    monkeypatch.setattr(zero3_source, "dist", found)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bucket_is_whole_on_rank_0(dtype: torch.dtype, wire: Wire) -> None:
    bucket = Bucket.of(SPECS)
    for rank in reversed(range(NUM_RANKS)):
        wire.rank = rank
        source = Zero3Source(Module(rank), dtype)
        assert source.specs() == SPECS
        assert (source.dtype, source.device) == (dtype, torch.device("cpu"))
        flat = torch.full((bucket.numel,), torch.nan, dtype=dtype) if rank == 0 else None
        source.gather(bucket, flat).wait(7.0)
    assert flat is not None
    for name, view in bucket.views(flat):
        assert view.tolist() == WEIGHTS[name].tolist()
    assert wire.sent == {1: [], 2: []}, "everything that was sent has been received"
    assert wire.waited == [7.0] * NUM_RANKS


def test_ranks_without_a_part_send_nothing(wire: Wire) -> None:
    """Two elements on three ranks."""
    bucket = Bucket.of(SPECS[1:])
    for rank in (2, 1, 0):
        wire.rank = rank
        flat = torch.zeros(bucket.numel) if rank == 0 else None
        Zero3Source(Module(rank), torch.float32).gather(bucket, flat).wait(1.0)
    assert flat is not None
    assert flat.tolist() == [20, 21]
    assert set(wire.sent) == {1}


def test_a_rank_that_is_gone_is_an_error_of_the_sync(wire: Wire) -> None:
    wire.rank, wire.broken = 1, True
    gather = Zero3Source(Module(1), torch.float32).gather(Bucket.of(SPECS), None)
    with pytest.raises(WeightSyncError, match="ranks could not gather their shards: connection closed"):
        gather.wait(1.0)


def test_every_rank_can_have_whole_tensors(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module(1)
    wire.rank = 1

    class Gathered:
        def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
            self._parameters = parameters

        def __enter__(self) -> None:
            names = {parameter: name for name, parameter in module.named_parameters()}
            for parameter in self._parameters:
                parameter.data = WEIGHTS[names[parameter]].clone()

        def __exit__(self, *_: object) -> None:
            for parameter in self._parameters:
                parameter.data.fill_(torch.nan)

    monkeypatch.setattr(zero3_source, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=Gathered)))
    given = dict(Zero3Source(module, torch.bfloat16).materialize(Bucket.of(SPECS)))
    assert [tensor.dtype for tensor in given.values()] == [torch.bfloat16] * 2
    assert {name: tensor.tolist() for name, tensor in given.items()} == {n: t.tolist() for n, t in WEIGHTS.items()}
