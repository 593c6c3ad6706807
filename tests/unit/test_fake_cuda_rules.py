"""The rules of the fake machine are CUDA's, NCCL's and Ray's: as far as tests rely on them."""

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.fake_cuda.collectives import CollectiveError, Group
from tests.fake_cuda.machine import CudaError, Node, Process, SleepPool, current, inheriting, inside

pytestmark = pytest.mark.timeout(30)

VISIBLE = "CUDA_VISIBLE_DEVICES"


@pytest.fixture(autouse=True)
def no_handles() -> Iterator[None]:
    yield
    Process.handles.clear()


def node(num_gpus: int = 4, gpu_bytes: int = 1000) -> Node:
    return Node("node0", num_gpus, gpu_bytes)


@pytest.mark.parametrize(
    ("value", "seen"),
    [(None, [0, 1, 2, 3]), ("2,0", [2, 0]), ("", []), ("1,7,2", [1]), ("-1", []), ("3", [3])],
)
def test_a_process_sees_the_gpus_of_the_list_up_to_the_first_that_is_none(value: str | None, seen: list[int]) -> None:
    process = Process(node(), {} if value is None else {VISIBLE: value}, "p")
    assert [gpu.index for gpu in process.devices] == seen


def test_the_list_is_read_once() -> None:
    process = Process(node(), {VISIBLE: "1"}, "p")
    assert process.gpu(0).index == 1
    process.environ[VISIBLE] = "2"
    assert process.gpu(0).index == 1


def test_a_device_that_is_not_seen_is_an_error() -> None:
    process = Process(node(), {VISIBLE: "1"}, "p")
    with pytest.raises(CudaError, match="invalid device ordinal 1 in p, which sees 1"):
        process.set_device(1)
    with pytest.raises(CudaError, match="no CUDA-capable device 0"):
        Process(node(), {VISIBLE: ""}, "q").gpu()


def test_a_thread_is_part_of_its_process_and_starts_on_device_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", inheriting(threading.Thread.start))
    process = Process(node(), {}, "p")
    with inside(process), ThreadPoolExecutor(1) as threads:
        process.set_device(2)
        assert process.gpu().index == 2
        assert threads.submit(lambda: (current(), process.device_index)).result() == (process, 0)
    assert current() is None


def test_processes_share_the_memory_of_a_gpu() -> None:
    machine = node()
    one, other = Process(machine, {}, "one"), Process(machine, {}, "other")
    one.malloc(600)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        other.malloc(500)
    one.free(600)
    with pytest.raises(torch.OutOfMemoryError):
        other.malloc(500)  # the first one keeps what it freed
    one.malloc(300)
    assert machine.gpus[0].used == 600, "freed memory is used again first"
    one.empty_cache()
    other.malloc(500)
    assert machine.gpus[0].used == 800
    assert machine.gpus[0].peak == 800
    one.end()
    assert machine.gpus[0].used == 500


def exporter_and_importer() -> tuple[Process, Process]:
    machine = node()
    return Process(machine, {VISIBLE: "1"}, "owner"), Process(machine, {VISIBLE: "0,1"}, "reader")


def test_a_handle_is_of_memory_on_one_gpu() -> None:
    owner, reader = exporter_and_importer()
    tensor = owner.empty(8, owner.gpu(0)).fill_(3)
    handle = owner.export(tensor)
    assert reader.open(handle, 1).tolist() == [3] * 8
    tensor[2] = 9
    assert reader.open(handle, 1)[2] == 9
    with pytest.raises(CudaError, match="is of GPU-node0-1, device 0 of reader is GPU-node0-0"):
        reader.open(handle, 0)


@pytest.mark.parametrize("how", ["freed", "ended"])
def test_a_handle_dies_with_its_owners_memory(how: str) -> None:
    owner, reader = exporter_and_importer()
    tensor = owner.empty(8, owner.gpu(0)).zero_()
    handle = owner.export(tensor)
    mapped, view = reader.open(handle, 1), tensor[2:4]
    del tensor
    gc.collect()
    assert reader.open(handle, 1).tolist() == [0] * 8, "a view keeps the memory"
    if how == "freed":
        del view
        gc.collect()
        assert mapped.tolist() == [0xFF] * 8
    else:
        owner.end()
    with pytest.raises(CudaError, match="its owner has freed the memory"):
        reader.open(handle, 1)


def test_sleep_gives_memory_back_by_tag_and_moves_weights_to_the_host() -> None:
    machine = node()
    process = Process(machine, {}, "engine")
    pool = SleepPool(process, process.gpu())
    pool.allocate("weights", 300)
    pool.allocate("kv_cache", 400)
    pool.suspend(on_host="weights")
    assert (machine.gpus[0].used, machine.host_bytes) == (0, 300)
    pool.suspend(on_host="weights")
    with pytest.raises(CudaError, match="illegal memory access was encountered: weights of engine"):
        pool.require("weights")
    pool.resume(["weights"], on_host="weights")
    pool.require("weights")
    assert (machine.gpus[0].used, machine.host_bytes) == (300, 0)
    other = Process(machine, {}, "other")
    other.malloc(500)
    with pytest.raises(torch.OutOfMemoryError):
        pool.resume(None, on_host="weights")
    other.end()
    pool.resume(None, on_host="weights")
    assert machine.gpus[0].used == 700


def ranks(*calls: Callable[[], object]) -> list[object]:
    """The results or errors of calls of several ranks at the same time."""

    def outcome(call: Callable[[], object]) -> object:
        try:
            return call()
        except CollectiveError as error:
            return str(error)

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(outcome, calls))


def test_all_ranks_get_what_all_gave() -> None:
    group = Group("g", 3, timeout_s=5.0)
    for index in range(3):
        found = ranks(*(lambda rank=rank: group.call(rank, f"call {index}", rank) for rank in range(3)))  # noqa: B023
        assert found == [[0, 1, 2]] * 3


def test_another_call_is_named_with_its_ranks() -> None:
    group = Group("g", 3, timeout_s=5.0)
    found = ranks(
        lambda: group.call(0, "barrier", None),
        lambda: group.call(1, "all_reduce", None),
        lambda: group.call(2, "barrier", None),
    )
    assert found == ["g: ranks make different calls: barrier (rank 0, 2); all_reduce (rank 1)"] * 3


def test_a_rank_that_does_not_come_is_named_with_its_last_call() -> None:
    group = Group("g", 3, timeout_s=0.2)
    ranks(*(lambda rank=rank: group.call(rank, "join", None) for rank in range(3)))
    found = ranks(lambda: group.call(0, "barrier", None), lambda: group.call(2, "barrier", None))
    assert found == ["g: barrier: not all came in 0.2 s; the last calls of the others: join (rank 1)"] * 2


def test_two_ranks_on_one_gpu_are_refused() -> None:
    first, second = node().gpus[:2]
    group = Group("g", 3, timeout_s=5.0)
    found = ranks(
        *(lambda rank=rank, gpu=gpu: group.join(rank, gpu) for rank, gpu in enumerate([first, second, first]))
    )
    assert found == ["g: Duplicate GPU detected: ranks [0, 2] both on GPU-node0-0"] * 3
