"""The deadline and the errors of a transfer that vLLM's trainer engines do, on a machine without the GPUs they need."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from rlhf.engines.weight_sync.base import EngineClient, Info
from rlhf.engines.weight_sync.module_source import ModuleSource
from rlhf.engines.weight_sync.senders import make_sender
from rlhf.engines.weight_sync.vllm_sender import DigestingSource, VllmClient, VllmSender, open_with_deadline
from rlhf.errors import WeightSyncError
from tests.integration.rollout_support import IGNORE_VLLM_IMPORT_WARNINGS

pytestmark = [pytest.mark.timeout(60), *IGNORE_VLLM_IMPORT_WARNINGS]


@pytest.fixture(autouse=True)
def a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.engines.weight_sync.vllm_sender.HEALTH_CHECK_S", 0.0)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _index: None)


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


class Refusing:
    """Engines that cannot join."""

    engine_names = ("a",)

    def init_weight_transfer(self, infos: object, timeout_s: float) -> None:
        raise WeightSyncError("engine a died")


def client() -> VllmClient:
    source = cast(DigestingSource, None)
    return VllmClient(cast(EngineClient, Refusing()), source, num_receivers=1, timeout_s=1.0)


def sender(send_weights: Callable[[], object]) -> VllmSender:
    engine: Any = SimpleNamespace(send_weights=send_weights, shutdown=lambda: None)
    return VllmSender(engine, client(), cast(DigestingSource, None), timeout_s=0.5)


def fails(error: Exception) -> Callable[[], object]:
    def work() -> object:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (WeightSyncError("engine a: version 3: digest 1, need 2"), "^engine a: version 3: digest 1, need 2$"),
        (RuntimeError("NCCL error: remote process exited"), "^version 3: the transfer failed: NCCL error: remote"),
    ],
)
def test_the_cause_of_a_failed_transfer_is_reported(error: Exception, message: str) -> None:
    with pytest.raises(WeightSyncError, match=message):
        sender(fails(error)).send(3)


def test_a_transfer_that_hangs_times_out(hang: threading.Event) -> None:
    with pytest.raises(WeightSyncError, match=r"^version 3: not transferred in 0\.5 s$"):
        sender(hang.wait).send(3)


def test_an_error_of_joining_engines_is_raised_before_the_timeout(hang: threading.Event) -> None:
    """vLLM calls them from a thread of its own."""
    joining = client()

    def join() -> None:
        with pytest.raises(WeightSyncError):
            joining.init_weight_transfer_engine({})

    def start() -> Any:
        threading.Thread(target=join).start()
        hang.wait()

    start_s = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"^engine a died$"):
        open_with_deadline(start, joining, timeout_s=30.0)
    assert time.monotonic() - start_s < 10


def test_a_group_that_is_not_built_times_out_or_raises_its_error(hang: threading.Event) -> None:
    with pytest.raises(WeightSyncError, match=r"was not built in 0\.5 s$"):
        open_with_deadline(cast(Any, hang.wait), client(), timeout_s=0.5)
    with pytest.raises(WeightSyncError, match=r"cannot be built: no peer$"):
        open_with_deadline(cast(Any, fails(RuntimeError("no peer"))), client(), timeout_s=30.0)


class Engines:
    """Engines that note what they are told, and answer with `digests`."""

    engine_names = ("a", "b")

    def __init__(self, digests: Mapping[str, str]) -> None:
        self.told: list[object] = []
        self._digests = digests

    def init_weight_transfer(self, init_infos: Sequence[Info], timeout_s: float) -> None:
        self.told += [*init_infos, timeout_s]

    def start_weight_update(self, timeout_s: float) -> None:
        self.told.append(timeout_s)

    def update_weights(self, update_info: Info, timeout_s: float) -> None:
        self.told += [update_info, timeout_s]

    def finish_weight_update(self, version: int, digest: str, timeout_s: float) -> Mapping[str, str]:
        self.told += [version, digest, timeout_s]
        return {name: self._digests.get(name, digest) for name in self.engine_names}


def source() -> DigestingSource:
    """A layer of 3 x 2 weights and 3 biases, one to a bucket, as bfloat16."""
    with torch.no_grad():
        module = torch.nn.Linear(2, 3)
        module.weight.copy_(torch.arange(6.0).view(3, 2))
    return DigestingSource(ModuleSource(module, torch.bfloat16), bucket_bytes=1)


def test_vllm_gets_every_tensor_with_its_name_dtype_and_shape() -> None:
    given = source()
    assert [(meta.name, meta.dtype, tuple(meta.shape)) for meta in given.metadata()] == [
        ("weight", torch.bfloat16, (3, 2)),
        ("bias", torch.bfloat16, (3,)),
    ]
    assert (given.num_bytes, given.largest_parameter_bytes, len(given.buckets)) == (18, 12, 2)
    before = given.digest.hexdigest()
    tensors = dict(given)
    assert tensors["weight"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert [tensor.dtype for tensor in tensors.values()] == [torch.bfloat16] * 2
    whole = given.digest.hexdigest()
    assert whole != before
    next(iter(given))
    assert given.digest.hexdigest() not in (before, whole), "a new round is a new digest"


def test_ranks_that_do_not_send_compute_no_digest() -> None:
    """Nobody reads it, and it would read every weight once more."""
    other = DigestingSource(ModuleSource(torch.nn.Linear(2, 3), torch.bfloat16), bucket_bytes=1, is_sender=False)
    before = other.digest.hexdigest()
    assert len(dict(other)) == 2
    assert other.digest.hexdigest() == before


def test_each_engine_gets_its_own_ranks() -> None:
    engines = Engines({})
    joining = VllmClient(cast(EngineClient, engines), source(), num_receivers=4, timeout_s=7.0)
    joining.init_weight_transfer_engine({"rank_offset": 0, "x": 1})
    assert engines.told == [{"rank_offset": 1, "x": 1}, {"rank_offset": 3, "x": 1}, 7.0]
    assert joining.failure is None
    engines.told.clear()
    joining.init_weight_transfer_engine({"x": 1})
    assert engines.told == [{"x": 1}, {"x": 1}, 7.0]


def test_a_version_is_complete_when_the_engines_have_its_digest() -> None:
    engines, given = Engines({}), source()
    told = VllmClient(cast(EngineClient, engines), given, num_receivers=2, timeout_s=7.0)
    told.version = 5
    told.start_weight_update()
    dict(given)
    told.update_weights({"x": 1})
    told.finish_weight_update()
    assert told.digest == given.digest.hexdigest()
    assert engines.told == [7.0, {"x": 1}, 7.0, 5, told.digest, 7.0]
    assert told.num_calls == 6


def test_only_engines_with_another_digest_are_named() -> None:
    told = VllmClient(cast(EngineClient, Engines({"b": "other"})), source(), num_receivers=2, timeout_s=7.0)
    told.version = 5
    with pytest.raises(WeightSyncError, match=r"^engine b: version 5: digest other, need \w{32}$"):
        told.finish_weight_update()


def test_a_report_is_of_what_was_sent() -> None:
    engines, given = Engines({}), source()
    told = VllmClient(cast(EngineClient, engines), given, num_receivers=2, timeout_s=7.0)

    def send_weights() -> None:
        told.start_weight_update()
        dict(given)
        told.finish_weight_update()

    closed: list[bool] = []
    engine: Any = SimpleNamespace(send_weights=send_weights, shutdown=lambda: closed.append(True))
    both = VllmSender(engine, told, given, timeout_s=7.0)
    for version in (3, 4):
        report = both.send(version)
        assert (report.version, report.digest, report.num_bytes) == (version, given.digest.hexdigest(), 18)
        assert (report.num_buckets, report.num_remote_calls) == (2, 4)
        assert 0 <= report.seconds < 5
    both.close()
    assert closed == [True]


def test_work_is_done_on_the_callers_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread starts on the first one."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    opened, start_s = cast(Any, "engine"), time.monotonic()
    assert open_with_deadline(lambda: opened, client(), timeout_s=30.0) == opened
    assert time.monotonic() - start_s < 10
    assert chosen == [3]
    with pytest.raises(WeightSyncError):
        sender(fails(RuntimeError("x"))).send(0)
    assert chosen == [3, 3]


@pytest.mark.parametrize(("bucket_bytes", "buffer_bytes"), [(1, 12), (1000, 1000)])
@pytest.mark.parametrize(("backend", "port"), [("nccl", 0), ("nccl", 4321), ("ipc", 0)])
def test_vllm_is_told_the_group_and_a_buffer_for_the_largest_tensor(
    backend: str, port: int, bucket_bytes: int, buffer_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerWeightTransferEngine  # noqa: PLC0415
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine  # noqa: PLC0415

    opened: list[Any] = []

    def trainer_init(init_info: object, *, client: object, source: object) -> object:
        opened.extend([init_info, client, source])
        return SimpleNamespace(send_weights=lambda: dict(cast(Any, source)), shutdown=lambda: None)

    for engine in (IPCTrainerWeightTransferEngine, NCCLTrainerWeightTransferEngine):
        monkeypatch.setattr(engine, "trainer_init", trainer_init)
    engines = Engines({})
    made = make_sender(
        backend,
        ModuleSource(torch.nn.Linear(2, 3), torch.bfloat16),
        cast(EngineClient, engines),
        rank=1,
        world_size=2,
        master_address="10.0.0.1",
        port=port,
        num_receivers=4,
        bucket_bytes=bucket_bytes,
        timeout_s=7.0,
    )
    info, told, given = opened
    assert (info.backend, info.rank, info.packed, info.packed_buffer_size_bytes) == (backend, 1, True, buffer_bytes)
    if backend == "nccl":
        assert (info.master_address, info.world_size) == ("10.0.0.1", 5)
        assert info.master_port == port or (port == 0 and 1024 <= info.master_port < 65536)
    told.init_weight_transfer_engine({"rank_offset": 0})
    assert engines.told == [{"rank_offset": 1}, {"rank_offset": 3}, 7.0]
    assert made.send(3).num_bytes == given.num_bytes == 18
    made.close()
