"""Nodes, GPUs with a size, and processes: which GPUs each of them sees, and what it holds there."""

import ctypes
import itertools
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

GIB = 1 << 30
POISON = 0xFF
"""What freed memory holds."""
_local = threading.local()
_ids = itertools.count(1)


class CudaError(RuntimeError):
    """What CUDA refuses."""


class Gpu:
    """One GPU of a node. Several processes share its memory."""

    def __init__(self, node: "Node", index: int, total: int) -> None:
        self.node = node
        self.index = index
        self.uuid = f"GPU-{node.name}-{index}"
        self.total = total
        self.peak = 0
        self.peak_of_update = 0
        """While an engine on it receives weights."""
        self._held: defaultdict[int, int] = defaultdict(int)
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes that processes hold."""
        return sum(self._held.values())

    def take(self, process: "Process", nbytes: int) -> None:
        """Give a process memory. Raises OutOfMemoryError."""
        with self._lock:
            free = self.total - self.used
            if nbytes > free:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {nbytes / GIB:.2f} GiB. {self.uuid} has "
                    f"{self.total / GIB:.2f} GiB, of which {free / GIB:.2f} GiB are free."
                )
            self._held[process.pid] += nbytes
            self.peak = max(self.peak, self.used)

    def give_back(self, process: "Process", nbytes: int) -> None:
        with self._lock:
            self._held[process.pid] -= nbytes

    def drop(self, process: "Process") -> None:
        """The driver frees all that a process held when it ends."""
        with self._lock:
            self._held.pop(process.pid, None)


@dataclass(eq=False)
class Node:
    """A machine."""

    name: str
    num_gpus: int
    gpu_bytes: int
    environ: Mapping[str, str] = field(default_factory=dict)
    """What its processes inherit."""
    gpus: list[Gpu] = field(init=False)
    host_bytes: int = 0
    """Memory that sleeping engines have moved to the host."""

    @property
    def address(self) -> str:
        return f"127.0.0.{1 + int(self.name.removeprefix('node'))}"

    def __post_init__(self) -> None:
        self.gpus = [Gpu(self, index, self.gpu_bytes) for index in range(self.num_gpus)]


@dataclass
class Exported:
    """A buffer that was exported by a CUDA IPC handle. It is its owner's: the handle keeps nothing alive."""

    owner: "Process"
    gpu: Gpu
    memory: bytearray
    is_freed: bool = False


class Process:
    """A process on a node. It sees the GPUs that CUDA_VISIBLE_DEVICES names when it first asks, and no others later."""

    handles: ClassVar[dict[int, Exported]] = {}
    """Of all processes, as the driver of the GPUs knows them."""

    def __init__(self, node: Node, environ: Mapping[str, str], name: str) -> None:
        self.node = node
        self.name = name
        self.pid = next(_ids)
        self.environ = dict(environ)
        self.is_alive = True
        self.group: Any = None
        """The process group that it has joined, and its rank there."""
        self.rank = 0
        self._visible: list[Gpu] | None = None
        self._allocated: defaultdict[Gpu, int] = defaultdict(int)
        self._reserved: defaultdict[Gpu, int] = defaultdict(int)
        self._exports: dict[int, Exported] = {}
        self._lock = threading.RLock()

    @property
    def devices(self) -> list[Gpu]:
        """The GPUs that it sees. CUDA reads the list up to the first entry that names none."""
        if self._visible is None:
            chosen = self.environ.get("CUDA_VISIBLE_DEVICES")
            indices = list(map(str, range(self.node.num_gpus))) if chosen is None else chosen.split(",")
            known = {str(gpu.index): gpu for gpu in self.node.gpus}
            self._visible = [known[index] for index in itertools.takewhile(known.__contains__, indices)]
        return self._visible

    @property
    def device_index(self) -> int:
        """The current device of this thread; a thread starts on device 0."""
        return int(getattr(_local, "device", 0))

    def set_device(self, index: int) -> None:
        if not 0 <= index < len(self.devices):
            raise CudaError(
                f"CUDA error: invalid device ordinal {index} in {self.name}, which sees {len(self.devices)}"
            )
        _local.device = index

    def gpu(self, index: int | None = None) -> Gpu:
        """A device, by default the current one."""
        index = self.device_index if index is None else index
        if not 0 <= index < len(self.devices):
            raise CudaError(f"CUDA error: no CUDA-capable device {index} is detected by {self.name}")
        return self.devices[index]

    def malloc(self, nbytes: int, gpu: Gpu | None = None) -> None:
        """torch's allocator: memory that was freed is used again before the GPU is asked for more."""
        gpu = gpu or self.gpu()
        with self._lock:
            missing = self._allocated[gpu] + nbytes - self._reserved[gpu]
            if missing > 0:
                gpu.take(self, missing)
                self._reserved[gpu] += missing
            self._allocated[gpu] += nbytes

    def free(self, nbytes: int, gpu: Gpu | None = None) -> None:
        """The memory stays with this process until `empty_cache`."""
        with self._lock:
            self._allocated[gpu or self.gpu()] -= nbytes

    def empty_cache(self) -> None:
        with self._lock:
            for gpu, reserved in self._reserved.items():
                gpu.give_back(self, reserved - self._allocated[gpu])
                self._reserved[gpu] = self._allocated[gpu]

    def empty(self, nbytes: int, gpu: Gpu) -> torch.Tensor:
        """A uint8 tensor of memory that is freed with the last tensor that uses it."""
        self.malloc(nbytes, gpu)
        memory = bytearray(nbytes)
        owned = (ctypes.c_uint8 * nbytes).from_buffer(memory)
        exported = Exported(self, gpu, memory)
        weakref.finalize(owned, self._release, exported)
        tensor = torch.frombuffer(owned, dtype=torch.uint8)
        with self._lock:
            self._exports[tensor.data_ptr()] = exported
        return tensor

    def _release(self, exported: Exported) -> None:
        exported.is_freed = True
        exported.memory[:] = bytes([POISON]) * len(exported.memory)
        self.free(len(exported.memory), exported.gpu)

    def export(self, tensor: torch.Tensor) -> int:
        """A CUDA IPC handle of the memory of `tensor`."""
        exported = self._exports[tensor.untyped_storage().data_ptr()]
        handle = next(_ids)
        Process.handles[handle] = exported
        return handle

    def open(self, handle: int, index: int) -> torch.Tensor:
        """The memory of another process's handle, on device `index` of this one. Raises CudaError: its owner has freed
        it, or ended, or it lies on another GPU."""
        exported = Process.handles.get(handle)
        gone = exported is None or exported.is_freed or not exported.owner.is_alive
        if exported is None or gone:
            raise CudaError(f"CUDA error: invalid IPC handle {handle} in {self.name}: its owner has freed the memory")
        if exported.gpu is not self.gpu(index):
            raise CudaError(
                f"CUDA error: IPC handle {handle} is of {exported.gpu.uuid}, device {index} of {self.name} is "
                f"{self.gpu(index).uuid}"
            )
        return torch.frombuffer(exported.memory, dtype=torch.uint8)

    def end(self) -> None:
        """Whatever it held is free, and its handles are invalid."""
        self.is_alive = False
        for gpu in self.node.gpus:
            gpu.drop(self)


def current() -> Process | None:
    """The process that this thread is part of; None for the driver."""
    found: Process | None = getattr(_local, "process", None)
    return found


class inside:  # noqa: N801  - used as a function
    """This thread is part of a process, inside the block. No generator: the end of one that is collected as garbage
    would run in any thread."""

    def __init__(self, process: Process | None) -> None:
        self._process = process

    def __enter__(self) -> None:
        self._before = current(), getattr(_local, "device", 0)
        _local.process, _local.device = self._process, 0

    def __exit__(self, *_: object) -> None:
        _local.process, _local.device = self._before


def inheriting(start: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """`Thread.start` of which the new thread is part of the process that starts it."""

    def started(thread: threading.Thread) -> None:
        process, run = current(), thread.run

        def inherited() -> None:
            with inside(process):
                run()

        thread.run = inherited  # type: ignore[method-assign]
        start(thread)

    return started


class SleepPool:
    """Memory of an engine that is released while it sleeps, by tag. Using it meanwhile is an illegal access."""

    def __init__(self, process: Process, gpu: Gpu) -> None:
        self._process = process
        self._gpu = gpu
        self._sizes: dict[str, int] = {}
        self._asleep: set[str] = set()

    def allocate(self, tag: str, nbytes: int) -> None:
        self._gpu.take(self._process, nbytes)
        self._sizes[tag] = nbytes

    def suspend(self, on_host: str) -> None:
        """Release everything; what is tagged `on_host` moves to host memory."""
        for tag in self._sizes.keys() - self._asleep:
            self._gpu.give_back(self._process, self._sizes[tag])
            if tag == on_host:
                self._process.node.host_bytes += self._sizes[tag]
        self._asleep = set(self._sizes)

    def resume(self, tags: list[str] | None, on_host: str) -> None:
        for tag in sorted(self._asleep & set(self._sizes if tags is None else tags)):
            self._gpu.take(self._process, self._sizes[tag])
            self._asleep.remove(tag)
            if tag == on_host:
                self._process.node.host_bytes -= self._sizes[tag]

    def require(self, tag: str) -> None:
        """Raises CudaError while the memory is released."""
        if tag in self._asleep:
            raise CudaError(f"CUDA error: an illegal memory access was encountered: {tag} of {self._process.name}")
