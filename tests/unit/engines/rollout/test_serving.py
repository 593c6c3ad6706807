"""When an engine may serve, and what it says when it may not."""

import threading
import time

import pytest

from rlhf.engines.rollout.serving import ServingGate, ServingState
from rlhf.errors import RlhfError, StallError, WeightSyncError

pytestmark = pytest.mark.timeout(20)


def test_an_engine_serves_the_version_it_was_started_with() -> None:
    assert ServingGate("e").enter(0) == 0


def test_a_sleeping_engine_raises_until_it_is_woken() -> None:
    gate = ServingGate("e")
    gate.sleep()
    gate.sleep()
    with pytest.raises(RlhfError, match="engine e: asleep"):
        gate.enter(0)
    with pytest.raises(RlhfError, match="cannot take new weights while asleep"):
        gate.begin_update()
    gate.wake()
    gate.wake()
    assert gate.enter(0) == 0


def test_a_sleeping_engine_whose_weights_are_awake_takes_new_ones_and_serves_them_when_it_wakes() -> None:
    gate = ServingGate("e")
    gate.sleep()
    gate.wake_weights()
    assert gate.sleeps
    with pytest.raises(RlhfError, match="engine e: asleep"):
        gate.enter(0)
    gate.begin_update()
    gate.received("d")
    gate.serve(3, "d")
    with pytest.raises(RlhfError, match="engine e: asleep"):
        gate.enter(0)
    gate.wake()
    assert gate.enter(0) == 3
    gate.sleep()
    with pytest.raises(RlhfError, match="cannot take new weights while asleep"):
        gate.begin_update()


def test_an_engine_that_wakes_after_a_failed_update_serves_nothing_until_a_complete_one() -> None:
    gate = ServingGate("e")
    gate.sleep()
    gate.wake_weights()
    gate.begin_update()
    gate.fail(WeightSyncError("lost"))
    assert gate.sleeps
    gate.wake()
    assert not gate.sleeps
    with pytest.raises(WeightSyncError, match="lost"):
        gate.enter(0)
    gate.begin_update()
    gate.received("d")
    gate.serve(1, "d")
    assert gate.enter(0) == 1


def test_enter_waits_for_an_update() -> None:
    gate = ServingGate("e")
    gate.begin_update()
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(gate.enter(10)))
    thread.start()
    time.sleep(0.05)
    assert seen == []
    gate.received("d")
    assert gate.serve(1, "d") == "d"
    thread.join(5)
    assert seen == [1]


def test_an_update_that_does_not_end_is_a_stall() -> None:
    gate = ServingGate("e")
    gate.begin_update()
    with pytest.raises(StallError, match=r"waited 0\.01 s"):
        gate.enter(0.01)


def test_a_wrong_digest_fails_the_update_and_all_requests_until_a_complete_one() -> None:
    gate = ServingGate("e")
    gate.begin_update()
    gate.received("bad")
    with pytest.raises(WeightSyncError, match="engine e: version 4: received bad, need good"):
        gate.serve(4, "good")
    assert gate.state is ServingState.FAILED
    with pytest.raises(WeightSyncError, match="received bad, need good"):
        gate.enter(0)
    with pytest.raises(RlhfError, match="cannot sleep while failed"):
        gate.sleep()
    gate.begin_update()
    gate.received("good")
    gate.serve(5, "good")
    assert gate.enter(0) == 5


def test_nothing_received_is_not_served_even_if_the_last_update_had_the_same_digest() -> None:
    gate = ServingGate("e")
    gate.begin_update()
    gate.received("d")
    gate.serve(1, "d")
    gate.begin_update()
    with pytest.raises(WeightSyncError, match="received nothing while updating"):
        gate.serve(2, "d")


def test_weights_without_an_update_are_an_error() -> None:
    gate = ServingGate("e")
    with pytest.raises(WeightSyncError, match="no update was started"):
        gate.received("d")
    with pytest.raises(WeightSyncError):
        gate.serve(1, "d")
