"""What torch and vLLM ask of CUDA and NCCL, answered by the fake machine for threads of its processes."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlhf.engines.process import rendezvous
from tests.fake_cuda.collectives import Group
from tests.fake_cuda.machine import Process, current, inheriting

Answer = Callable[..., Any]
STREAM = SimpleNamespace(synchronize=lambda: None, wait_stream=lambda _other: None)


class Environ(MutableMapping[str, str]):
    """os.environ of the process that asks."""

    def __init__(self, outside: MutableMapping[str, str]) -> None:
        self._outside = outside

    @property
    def _own(self) -> MutableMapping[str, str]:
        process = current()
        return self._outside if process is None else process.environ

    def __getitem__(self, name: str) -> str:
        return self._own[name]

    def __setitem__(self, name: str, value: str) -> None:
        self._own[name] = value

    def __delitem__(self, name: str) -> None:
        del self._own[name]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._own))

    def __len__(self) -> int:
        return len(self._own)

    def copy(self) -> dict[str, str]:
        return dict(self._own)


def inside_or(outside: Answer, answer: Answer) -> Answer:
    """`answer(process, ...)` in a fake process, `outside` elsewhere."""

    def call(*args: Any, **kwargs: Any) -> Any:
        process = current()
        return outside(*args, **kwargs) if process is None else answer(process, *args, **kwargs)

    return call


def empty(real: Answer) -> Answer:
    """`torch.empty` with memory of the fake GPU where a CUDA device is asked for."""

    def call(process: Process, *size: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return real(*size, **kwargs)
        shape = size[0] if len(size) == 1 and isinstance(size[0], Sequence) else size
        dtype: torch.dtype = kwargs.get("dtype") or torch.float32
        nbytes = prod(shape) * dtype.itemsize
        if not nbytes:
            return real(*size, **{**kwargs, "device": "cpu"})
        gpu = process.gpu(torch.device(device).index)
        return process.empty(nbytes, gpu).view(dtype).view(tuple(shape))

    return inside_or(real, call)


def reduce_tensor(tensor: torch.Tensor) -> tuple[None, tuple[object, ...]]:
    """As torch's: arguments from which another process rebuilds the tensor. Index 6 is the device."""
    process = current()
    assert process is not None
    return None, (*("",) * 6, process.device_index, process.export(tensor))


def rebuild_cuda_tensor(*args: Any) -> torch.Tensor:
    """As torch's."""
    process = current()
    assert process is not None
    return process.open(args[7], args[6])


class Communicator:
    """vLLM's NCCL communicator."""

    def __init__(self, group: Group, rank: int) -> None:
        self._group = group
        self._rank = rank

    def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
        del stream
        what = f"broadcast of {tensor.numel()} {tensor.dtype} from rank {src}"
        sent = self._group.call(self._rank, what, tensor.clone() if self._rank == src else None)[src]
        if self._rank != src:
            assert isinstance(sent, torch.Tensor)
            tensor.copy_(sent)

    def destroy(self) -> None:
        self._group.leave(self._rank)


class Groups:
    """The process groups of a cluster, by where they meet."""

    def __init__(self, timeout_s: float) -> None:
        """A call that not all ranks make within `timeout_s` fails."""
        self._timeout_s = timeout_s
        self._groups: dict[object, Group] = {}
        self._lock = threading.Lock()

    def of(self, place: object, name: str, size: int) -> Group:
        with self._lock:
            return self._groups.setdefault(place, Group(name, size, self._timeout_s))

    def communicator(self, address: str, port: int, rank: int, world_size: int, device: int) -> Communicator:
        """In place of vLLM's `stateless_init_process_group`."""
        process = current()
        assert process is not None
        group = self.of((address, port), "weight transfer", world_size)
        group.join(rank, process.gpu(device))
        return Communicator(group, rank)

    def init_process_group(
        self, process: Process, *, backend: str, store: Any, rank: int, world_size: int, timeout: object
    ) -> None:
        """In place of torch's, for the default group."""
        del timeout
        assert backend == "nccl"
        process.group, process.rank = self.of((store.host, store.port), "ranks", world_size), rank
        process.group.join(rank, process.gpu())


def _all_gather_object(process: Process, gathered: list[object], value: object) -> None:
    gathered[:] = process.group.call(process.rank, "all_gather_object", value)


def _size(process: Process) -> int:
    return 1 if process.group is None else int(process.group._size)


def install(patch: pytest.MonkeyPatch, groups: Groups) -> None:
    """Answer for torch, torch.distributed and vLLM."""
    from vllm.distributed.weight_transfer import nccl_common, packed_tensor  # noqa: PLC0415

    patch.setattr(os, "environ", Environ(os.environ))
    patch.setattr(threading.Thread, "start", inheriting(threading.Thread.start))
    for module, name, answer in (
        (torch.cuda, "is_available", lambda process: bool(process.devices)),
        (torch.cuda, "device_count", lambda process: len(process.devices)),
        (torch.cuda, "set_device", lambda process, index: process.set_device(torch.device("cuda", index).index)),
        (torch.cuda, "current_device", lambda process: process.device_index),
        (torch.cuda, "current_stream", lambda _process, *_: STREAM),
        (torch.cuda, "stream", lambda _process, _stream: contextlib.nullcontext()),
        (torch.cuda, "synchronize", lambda _process, *_: None),
        (torch.cuda, "ipc_collect", lambda _process: None),
        (torch.cuda, "empty_cache", lambda process: process.empty_cache()),
        (torch.cuda, "get_device_properties", lambda process, index: SimpleNamespace(uuid=process.gpu(index).uuid)),
        (torch.accelerator, "current_device_index", lambda process: process.device_index),
        (torch.accelerator, "set_device_index", lambda process, index: process.set_device(index)),
        (torch.accelerator, "synchronize", lambda _process, *_: None),
        (dist, "is_initialized", lambda process: process.group is not None),
        (dist, "get_rank", lambda process, *_: process.rank),
        (dist, "get_world_size", lambda process, *_: _size(process)),
        (dist, "get_backend", lambda _process, *_: "fake"),
        (dist, "barrier", lambda process, *_: process.group.call(process.rank, "barrier", None)),
        (dist, "all_gather_object", _all_gather_object),
        (dist, "init_process_group", groups.init_process_group),
    ):
        patch.setattr(module, name, inside_or(getattr(module, name), answer))
    patch.setattr(torch, "empty", empty(torch.empty))
    patch.setattr(packed_tensor, "reduce_tensor", reduce_tensor)
    patch.setattr(packed_tensor, "_get_streams", lambda _device, number: (STREAM,) * number)
    patch.setattr("torch.multiprocessing.reductions.rebuild_cuda_tensor", rebuild_cuda_tensor)
    # Of a store, groups need to know where it is.
    patch.setattr(rendezvous, "open_store", lambda _rank, host, port, *_: SimpleNamespace(host=host, port=port))
    patch.setattr(nccl_common, "stateless_init_process_group", groups.communicator)
