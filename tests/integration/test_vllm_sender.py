"""The deadline and the errors of a transfer that vLLM's trainer engines do, on a machine without the GPUs they need."""

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from rlhf.engines.weight_sync.base import EngineClient
from rlhf.engines.weight_sync.vllm_sender import DigestingSource, VllmClient, VllmSender, open_with_deadline
from rlhf.errors import WeightSyncError

pytestmark = pytest.mark.timeout(60)


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
