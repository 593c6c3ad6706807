"""The lag buffer: the bound holds, and no wait is for ever."""

import doctest
import threading
import time

import pytest

from rlhf.errors import RewardError, StallError
from rlhf.orchestrator.run.preemption import StopRequest, StopRequestedError
from rlhf.orchestrator.step import buffer
from rlhf.orchestrator.step.buffer import LagBuffer

pytestmark = pytest.mark.timeout(20)


def test_the_example_in_the_docstring_is_true() -> None:
    assert doctest.testmod(buffer, optionflags=doctest.ELLIPSIS) == (0, 9)


def make(max_lag: int = 0, timeout_s: float = 5.0) -> LagBuffer[int]:
    return LagBuffer(max_lag=max_lag, slot_timeout_s=timeout_s, take_timeout_s=timeout_s)


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_a_batch_starts_only_when_its_lag_will_be_within_the_bound(max_lag: int) -> None:
    buffer = make(max_lag)
    live = 0
    lags = []
    started: list[int] = []

    def produce() -> None:
        for step in range(1, 21):
            assert buffer.acquire(step)
            started.append(step)
            buffer.put(live)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    for step in range(1, 21):
        version = buffer.take(step)
        lags.append(step - 1 - version)
        time.sleep(0.002)  # the producer has every chance to run ahead of what it may
        assert max(started) <= step + max_lag
        live = step
        buffer.release()
    thread.join(5)
    assert min(lags) >= 0
    assert max(lags) <= max_lag
    assert max(lags) == max_lag or max_lag > 1


def test_a_producer_without_a_slot_fails_after_its_timeout() -> None:
    buffer = make(timeout_s=0.05)
    assert buffer.acquire(1)
    with pytest.raises(StallError, match=r"rollouts of step 2 waited 0\.05 s for the trainer to free a slot"):
        buffer.acquire(2)


def test_a_trainer_without_a_batch_fails_after_its_timeout() -> None:
    with pytest.raises(StallError, match=r"the trainer waited 0\.05 s for the rollouts of step 4"):
        make(timeout_s=0.05).take(4)


def test_the_producers_error_comes_after_what_it_had_finished() -> None:
    buffer = make(1)
    buffer.put(7)
    buffer.fail(RewardError("down"))
    assert buffer.take(1) == 7
    with pytest.raises(RewardError, match="down"):
        buffer.take(2)


def test_close_unblocks_the_producer() -> None:
    buffer = make()
    assert buffer.acquire(1)
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(buffer.acquire(2)), daemon=True)
    thread.start()
    buffer.close()
    thread.join(5)
    assert answers == [False]


def test_a_slot_cannot_be_released_twice() -> None:
    buffer = make()
    buffer.acquire(1)
    buffer.put(1)
    buffer.take(1)
    buffer.release()
    with pytest.raises(RuntimeError, match="no batch was taken"):
        buffer.release()


def test_a_stop_request_ends_the_wait_for_a_batch() -> None:
    stop = StopRequest(1.0)
    buffer: LagBuffer[int] = LagBuffer(max_lag=0, slot_timeout_s=5, take_timeout_s=5, check=stop.check)
    threading.Timer(0.05, stop.request).start()
    with pytest.raises(StopRequestedError):
        buffer.take(1)
